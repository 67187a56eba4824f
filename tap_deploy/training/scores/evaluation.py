"""Evaluates predictions of PyTorch or of a bundle on the same scenes and prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from tap_deploy.config import PointLabel
from tap_deploy.errors import InputError
from tap_deploy.evaluation.clicks import inner_point
from tap_deploy.masks import mask_iou
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions
from tap_deploy.training.scenes.scenes import SceneSource
from tap_deploy.training.scores.cider import cider_d
from tap_deploy.training.scores.metrics import first_name

if TYPE_CHECKING:
    from tap_deploy.training.scenes.scenes import Scene, SceneObject

TOP_K = 5
PROMPT_KINDS = ("box", "point")
_CIDER_PERCENT = 100.0


class Subject(Protocol):
    """A predictor to evaluate: PyTorch, or a bundle on some backend."""

    def predict(self, image: npt.NDArray[np.uint8], *, prompts: Prompts, top_k: int) -> Regions:
        """Predict P prompts on uint8 [H, W, 3] RGB, with masks, captions and ``top_k`` concepts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptScores:
    """Means over all regions for one kind of prompt.

    Attributes:
        mask_iou: IoU with the true mask at the size of the picture, 0..1.
        concept_top1: fraction of regions whose likeliest concept is the true name.
        concept_top5: fraction of regions with the true name among the five likeliest concepts.
        caption_named: fraction of captions whose first name is the true name.
        caption_exact: fraction of captions equal to the true caption.
        cider: CIDEr-D times 100, as in papers.
    """

    mask_iou: float
    concept_top1: float
    concept_top5: float
    caption_named: float
    caption_exact: float
    cider: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of a subject.

    Attributes:
        regions: number of regions.
        box: scores with the true boxes as prompts.
        point: scores with one point in each object as prompts.
    """

    regions: int
    box: PromptScores
    point: PromptScores

    def to_dict(self) -> dict[str, object]:
        """Return the scores as JSON types."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Answer:
    """A predicted region and its truth.

    Attributes:
        iou: IoU with the true mask.
        names: likeliest concepts, the likeliest first.
        caption: predicted caption.
        truth: the object.
    """

    iou: float
    names: tuple[str, ...]
    caption: str
    truth: SceneObject


def evaluate(
    subject: Subject,
    source: SceneSource,
    num_regions: int,
    on_region: Callable[[], None] | None = None,
) -> Scores:
    """Evaluate a subject on the objects of the first scenes, prompted by box and by point.

    Args:
        subject: the predictor.
        source: scenes; seeds 0, 1, 2, … are used.
        num_regions: total number of objects; surplus objects of the last scene are left out.
        on_region: called once per region.

    Raises:
        InputError: ``num_regions`` is below 1, or the subject returns no masks, concepts or
            captions.
    """
    if num_regions < 1:
        raise InputError(f"num_regions is {num_regions}; expected at least 1")
    answers: dict[str, list[_Answer]] = {kind: [] for kind in PROMPT_KINDS}
    for scene, objects in _scenes(source, num_regions):
        regions = subject.predict(scene.image, prompts=_prompts(objects), top_k=TOP_K)
        found = _answers(regions, [*objects, *objects])
        answers["box"] += found[: len(objects)]
        answers["point"] += found[len(objects) :]
        for _ in objects:
            if on_region is not None:
                on_region()
    scored = {kind: _scores(answers[kind], source.names) for kind in PROMPT_KINDS}
    return Scores(regions=num_regions, box=scored["box"], point=scored["point"])


def comparison(scores: Mapping[str, Scores]) -> str:
    """Return a text table with a line per metric and prompt, and a column per subject."""
    width = max(12, *(len(name) + 2 for name in scores))
    lines = [f"{'':15}{'prompt':8}" + "".join(f"{name:>{width}}" for name in scores)]
    for field in dataclasses.fields(PromptScores):
        for kind in PROMPT_KINDS:
            values = [getattr(getattr(score, kind), field.name) for score in scores.values()]
            digits = 1 if field.name == "cider" else 3
            cells = "".join(f"{value:{width}.{digits}f}" for value in values)
            lines.append(f"{field.name:15}{kind:8}{cells}")
    regions = ", ".join(sorted({str(score.regions) for score in scores.values()}))
    return "\n".join([*lines, f"{regions} regions that the model was not trained on"])


def _scenes(
    source: SceneSource, num_regions: int
) -> Iterator[tuple[Scene, tuple[SceneObject, ...]]]:
    seed, left = 0, num_regions
    while left > 0:
        scene = source.scene(seed)
        if objects := scene.objects[:left]:
            yield scene, objects
        seed, left = seed + 1, left - len(objects)


def _prompts(objects: tuple[SceneObject, ...]) -> Prompts:
    """Return a box prompt for each object, then a point prompt for each."""
    points = [[[*inner_point(item.mask), PointLabel.FOREGROUND]] for item in objects]
    boxes = Prompts.from_boxes([item.box for item in objects])
    return Prompts.concatenate([boxes, Prompts.from_points(points)])


def _answers(regions: Regions, truths: list[SceneObject]) -> list[_Answer]:
    if regions.masks is None or regions.concepts is None or regions.captions is None:
        raise InputError(
            "the subject returns no masks, names or captions; expected all three; "
            "export the bundle with --concepts and --tokenizer"
        )
    return [
        _Answer(
            iou=mask_iou(mask, truth.mask),
            names=tuple(name for name, _ in concepts),
            caption=caption,
            truth=truth,
        )
        for mask, concepts, caption, truth in zip(
            regions.masks, regions.concepts, regions.captions, truths, strict=True
        )
    ]


def _scores(answers: list[_Answer], names: tuple[str, ...]) -> PromptScores:
    captions = [answer.caption for answer in answers]
    ciders = cider_d(captions, [[answer.truth.caption] for answer in answers])
    return PromptScores(
        mask_iou=_mean([answer.iou for answer in answers]),
        concept_top1=_mean([answer.names[:1] == (answer.truth.name,) for answer in answers]),
        concept_top5=_mean([answer.truth.name in answer.names[:TOP_K] for answer in answers]),
        caption_named=_mean(
            [first_name(answer.caption, names) == answer.truth.name for answer in answers]
        ),
        caption_exact=_mean([answer.caption == answer.truth.caption for answer in answers]),
        cider=_CIDER_PERCENT * _mean(ciders),
    )


def _mean(values: list[float] | list[bool]) -> float:
    return float(np.mean(values))
