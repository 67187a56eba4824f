"""Sample pictures of the demo model: prompts, and what a right answer is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tap_deploy.config import PointLabel
from tap_deploy.demo_model import DemoModel
from tap_deploy.errors import InputError
from tap_deploy.masks import mask_from_rle, rle_from_mask
from tap_deploy.prompts import Prompts
from tap_deploy.storage.files import atomic_file

SAMPLES_FILE = "samples.json"
POINT, BOX, SKETCH = PROMPT_KINDS = ("point", "box", "sketch")

XY = tuple[float, float]  # pixels of the picture


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
