"""The demo model: a small TAP that comes with this package, as files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tap_deploy.config import DEMO, PointLabel
from tap_deploy.errors import CheckpointError, InputError
from tap_deploy.masks import mask_from_rle, rle_from_mask
from tap_deploy.prompts import Prompts
from tap_deploy.storage.files import atomic_file

SAMPLES_FILE = "samples.json"
POINT, BOX, SKETCH = PROMPT_KINDS = ("point", "box", "sketch")
XY = tuple[float, float]  # pixels of the picture


DEMO_FOLDER = Path(__file__).with_name("demo")  # of what is installed
MAX_WEIGHTS_BYTES = 12_000_000  # what a repository can carry without a thought


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoModel:
    """Where the files of the demo model are.

    Attributes:
        folder: has them all; by default that of the package.
    """

    folder: Path = DEMO_FOLDER

    @property
    def weights(self) -> Path:
        """Return the checkpoint, float16 safetensors; see ``require``."""
        return self.folder / f"{DEMO}.safetensors"

    @property
    def config(self) -> Path:
        """Return the ``TapConfig`` as JSON."""
        return self.folder / f"{DEMO}.json"

    @property
    def tokenizer(self) -> Path:
        """Return the SentencePiece model."""
        return self.folder / "tokenizer.model"

    @property
    def concepts(self) -> Path:
        """Return the vocabulary."""
        return self.folder / "concepts.npz"

    @property
    def card(self) -> Path:
        """Return the model card, Markdown."""
        return self.folder / "MODEL_CARD.md"

    @property
    def scores(self) -> Path:
        """Return what the evaluation gave, JSON; the model card tells it to people."""
        return self.folder / "scores.json"

    @property
    def samples(self) -> Path:
        """Return the folder of sample pictures; see ``demo_samples``."""
        return self.folder / "samples"

    def require(self) -> DemoModel:
        """Return the same, having made sure that weights, tokenizer and concepts are there.

        Raises:
            CheckpointError: one of them is not.
        """
        for path in (self.weights, self.tokenizer, self.concepts):
            if not path.is_file():
                raise CheckpointError(
                    f"{DEMO} is not whole: {path} is missing; install this package anew, or "
                    "train a model and put it there: python -m tap_deploy.training -o RUN, then "
                    "python -m tap_deploy.training.ship.ship RUN"
                )
        return self


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SampleRegion:
    """A question about a sample picture, and the right answer.

    Attributes:
        prompt: "point", "box" or "sketch".
        points: of the prompt, XY in pixels: the point, two corners of the box, or the stroke.
        name: what the object is.
        caption: what is true of it.
        mask: bool [H, W], its visible part.
    """

    prompt: str
    points: tuple[XY, ...]
    name: str
    caption: str
    mask: npt.NDArray[np.bool_]

    def prompts(self) -> Prompts:
        """Return the question as the predictor takes it, one region."""
        if self.prompt == BOX:
            return Prompts.from_boxes([np.ravel(self.points)])
        if self.prompt == SKETCH:
            return Prompts.from_sketches([self.points])
        return Prompts.from_points([[[*point, PointLabel.FOREGROUND] for point in self.points]])

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; the mask as COCO run lengths."""
        return dataclasses.asdict(self) | {"mask": rle_from_mask(self.mask)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SampleRegion:
        """Build a region from what ``to_dict`` gave."""
        points = tuple((float(x), float(y)) for x, y in values["points"])
        return cls(**values | {"points": points, "mask": mask_from_rle(values["mask"])})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """A sample picture.

    Attributes:
        picture: file of the picture.
        seed: of the scene of split "test" that it shows.
        regions: one question for each object.
    """

    picture: Path
    seed: int
    regions: tuple[SampleRegion, ...]

    def prompts(self) -> Prompts:
        """Return all questions, in order."""
        return Prompts.concatenate([region.prompts() for region in self.regions])


def load_samples(folder: Path | None = None) -> tuple[Sample, ...]:
    """Read the sample pictures that come with the package, or those of another folder.

    Raises:
        InputError: they are not there, or cannot be read.
    """
    folder = DemoModel().samples if folder is None else folder
    path = folder / SAMPLES_FILE
    try:
        content = json.loads(path.read_text("utf-8"))
        return tuple(
            Sample(
                picture=folder / item["picture"],
                seed=item["seed"],
                regions=tuple(map(SampleRegion.from_dict, item["regions"])),
            )
            for item in content["samples"]
        )
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise InputError(
            f"sample pictures cannot be read from {path} ({exc!r}); install this package anew"
        ) from exc


def save_samples(samples: tuple[Sample, ...], folder: Path, about: dict[str, str]) -> None:
    """Write what ``load_samples`` reads; the pictures are there already.

    Beside each picture goes ``NAME.sketch.json``, its strokes, for ``tap-export run --sketch``.

    Args:
        samples: with pictures in ``folder``.
        folder: to write to.
        about: where they are from, and their licence.
    """
    items = []
    for sample in samples:
        regions = [region.to_dict() for region in sample.regions]
        items.append({"picture": sample.picture.name, "seed": sample.seed, "regions": regions})
        strokes = [list(map(list, r.points)) for r in sample.regions if r.prompt == SKETCH]
        if strokes:
            _write_json(folder / f"{sample.picture.stem}.sketch.json", strokes)
    _write_json(folder / SAMPLES_FILE, about | {"samples": items})


def _write_json(path: Path, content: object) -> None:
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(content) + "\n", "utf-8")
