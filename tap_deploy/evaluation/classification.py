"""Zero-shot instance classification on LVIS: the names of ground-truth boxes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from tap_deploy.concepts import Vocabulary
from tap_deploy.errors import InputError
from tap_deploy.evaluation.average_precision import (
    Metric,
    library_versions,
    lvis_scores,
    require_library,
)
from tap_deploy.evaluation.boxes import corners, prompts_from_boxes
from tap_deploy.evaluation.data_pictures import DataPicture
from tap_deploy.evaluation.instances import LVIS, Instances
from tap_deploy.evaluation.json_files import Entry
from tap_deploy.evaluation.subject import Subject, encoded

logger = logging.getLogger(__name__)

MIN_PROBABILITY = 0.001
NMS_IOU = 0.5
MAX_DETECTIONS = 300  # per picture

Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Classification:
    """Ground-truth boxes as prompts, each class scored by its probability and the predicted IoU.

    The score of a class is sqrt(probability x IoU prediction clipped to 0..1). Classes of a
    probability up to 0.001 are dropped, then boxes of a class that overlap with a better one by an
    IoU above 0.5, then all but the 300 best of a picture.

    Attributes:
        instances: pictures and true boxes.
        vocabulary: the concepts.
        category_ids: the category of each concept.
        key: what the answers depend on, by name.
    """

    instances: Instances
    vocabulary: Vocabulary
    category_ids: Sequence[int]
    key: Mapping[str, str]

    name: ClassVar[str] = "lvis-cls"

    @classmethod
    def read(
        cls,
        annotations: pathlib.Path,
        images: pathlib.Path,
        vocabulary: Vocabulary,
        *,
        limit: int | None = None,
    ) -> Classification:
        """Read a data set; see ``Instances`` for the arguments.

        Raises:
            InputError: the file is malformed, a picture is missing, or there are not as many
                concepts as categories.
            MissingDependencyError: lvis is not installed.
        """
        require_library(LVIS)
        instances = Instances.read(annotations, images, LVIS, limit=limit)
        if not instances.annotations:
            raise InputError(
                f"none of the {len(instances.pictures)} pictures to evaluate has an annotation; "
                "raise --limit"
            )
        concepts = hashlib.sha256(vocabulary.weights.tobytes())
        concepts.update("\0".join(vocabulary.names).encode())
        return cls(
            instances=instances,
            vocabulary=vocabulary,
            category_ids=categories_of(vocabulary, instances.categories),
            key={"annotations": instances.sha256, "concepts": concepts.hexdigest()},
        )

    @property
    def conditions(self) -> dict[str, str]:
        """What the metrics depend on beside the answers."""
        return library_versions(LVIS)

    @property
    def pictures(self) -> tuple[DataPicture, ...]:
        """The pictures to evaluate."""
        return self.instances.pictures

    @property
    def num_regions(self) -> int:
        """Number of boxes."""
        return len(self.instances.annotations)

    @functools.cached_property
    def _truths(self) -> dict[int, list[Entry]]:
        return self.instances.by_picture()

    def answer(self, subject: Subject, picture: DataPicture) -> dict[str, Any]:
        """Return ``named``: [index of the box, category id, score] of each detection."""
        boxes = [entry["bbox"] for entry in self._truths[picture.id]]
        if not boxes:
            return {"named": []}
        image = encoded(subject, picture)
        prompts = prompts_from_boxes(boxes, image.frame)
        regions = subject.predict(image, prompts=prompts, masks=False, captions=False)
        probabilities = self.vocabulary.scores(regions.semantic_embeddings)
        found = detections(corners(boxes), probabilities, regions.iou_predictions)
        return {"named": [[box, self.category_ids[column], score] for box, column, score in found]}

    def score(self, answers: Mapping[int, Mapping[str, Any]]) -> dict[str, float | None]:
        """Return the metrics in percent; None where no instance counts."""
        results = [
            {
                "image_id": picture,
                "category_id": category,
                "bbox": list(self._truths[picture][box]["bbox"]),
                "score": score,
            }
            for picture, answer in answers.items()
            for box, category, score in answer["named"]
        ]
        return lvis_scores(self.instances, results, Metric.BOX)


def detections(
    boxes: Floats, probabilities: Floats, iou_predictions: Floats
) -> list[tuple[int, int, float]]:
    """Return the detections of a picture: box, column of the vocabulary, score.

    Args:
        boxes: float32 [P, 4] XYXY.
        probabilities: of each concept, float32 [P, K].
        iou_predictions: float32 [P].
    """
    rows, columns = np.nonzero(probabilities > MIN_PROBABILITY)
    scores = np.sqrt(probabilities[rows, columns] * iou_predictions[rows].clip(0, 1))
    overlaps = box_ious(boxes)
    kept = np.zeros(len(rows), np.bool_)
    for column in np.unique(columns):
        of_class = np.flatnonzero(columns == column)
        order = of_class[np.argsort(-scores[of_class], kind="stable")]
        while len(order):
            kept[order[0]] = True
            order = order[overlaps[rows[order[0]], rows[order]] <= NMS_IOU]
    chosen = np.flatnonzero(kept)
    if len(chosen) > MAX_DETECTIONS:
        least = np.sort(scores[chosen])[-MAX_DETECTIONS]
        chosen = chosen[scores[chosen] >= least]  # the library drops what is too much by a tie
    return [(int(rows[i]), int(columns[i]), float(scores[i])) for i in chosen]


def box_ious(boxes: Floats) -> Floats:
    """Return the IoU of each pair of boxes float32 [P, 4] XYXY, float32 [P, P]; 1 with itself."""
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    common = (high - low).clip(0).prod(axis=2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    union = areas[:, None] + areas[None, :] - common
    ious: Floats = common / np.where(union > 0, union, 1)
    np.fill_diagonal(ious, 1)  # also of boxes without area
    return ious


def categories_of(vocabulary: Vocabulary, categories: Sequence[Entry]) -> list[int]:
    """Return the id of the category of each concept.

    Concepts are matched by name if all names are those of the categories, and by their place in
    both lists, as in the public script, otherwise.

    Raises:
        InputError: there are not as many concepts as categories.
    """
    if len(vocabulary) != len(categories):
        raise InputError(
            f"the vocabulary has {len(vocabulary)} concepts, the annotations {len(categories)} "
            "categories; expected the same; pass the concepts of the data set, such as "
            "lvis_1203.pkl, in --concepts"
        )
    ids = {_plain(entry["name"]): entry["id"] for entry in categories}
    names = [_plain(name) for name in vocabulary.names]
    if len(ids) == len(categories) and {*names} == {*ids}:
        return [ids[name] for name in names]
    pairs = zip(names, categories, strict=True)
    differ = [(name, entry["name"]) for name, entry in pairs if name != _plain(entry["name"])]
    logger.info(
        "concepts are matched to categories by their place, as %d of %d names differ, the first "
        "%r and %r",
        len(differ),
        len(names),
        *differ[0],
    )
    return [entry["id"] for entry in categories]


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name.lower()).strip()
