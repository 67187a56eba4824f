"""Files of the demo model, a small TAP shipped with this package, and its sample pictures."""

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
from tap_deploy.storage.json_files import read_json

SAMPLES_FILE = "samples.json"
POINT, BOX, SKETCH = PROMPT_KINDS = ("point", "box", "sketch")
XY = tuple[float, float]  # pixels of the picture


DEMO_FOLDER = Path(__file__).with_name("demo")
MAX_WEIGHTS_BYTES = 12_000_000  # keeps the repository small


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoModel:
    """Paths of the demo model's files.

    Attributes:
        folder: folder of the files, by default that of the package.
    """

    folder: Path = DEMO_FOLDER

    @property
    def weights(self) -> Path:
        """Path of the checkpoint, float16 safetensors."""
        return self.folder / f"{DEMO}.safetensors"

    @property
    def config(self) -> Path:
        """Path of the ``TapConfig``, JSON."""
        return self.folder / f"{DEMO}.json"

    @property
    def tokenizer(self) -> Path:
        """Path of the SentencePiece model."""
        return self.folder / "tokenizer.model"

    @property
    def concepts(self) -> Path:
        """Path of the vocabulary, npz."""
        return self.folder / "concepts.npz"

    @property
    def card(self) -> Path:
        """Path of the model card, Markdown."""
        return self.folder / "MODEL_CARD.md"

    @property
    def scores(self) -> Path:
        """Path of the evaluation results, JSON; the model card reports the same in prose."""
        return self.folder / "scores.json"

    @property
    def samples(self) -> Path:
        """Folder of the sample pictures; see ``load_samples``."""
        return self.folder / "samples"

    def require(self) -> DemoModel:
        """Return this object after checking that weights, tokenizer and concepts exist.

        Raises:
            CheckpointError: one of them is missing.
        """
        for path in (self.weights, self.tokenizer, self.concepts):
            if not path.is_file():
                raise CheckpointError(
                    f"{DEMO} is incomplete: {path} is missing; reinstall this package, or train "
                    "a model and ship it: python -m tap_deploy.training -o RUN, then "
                    "python -m tap_deploy.training.ship.ship RUN"
                )
        return self


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SampleRegion:
    """A prompt on a sample picture, with its ground truth.

    Attributes:
        prompt: kind of prompt: "point", "box" or "sketch".
        points: XY in pixels: the point, the two corners of the box, or the stroke.
        name: ground-truth concept.
        caption: ground-truth caption.
        mask: visible part of the object, bool [H, W].
    """

    prompt: str
    points: tuple[XY, ...]
    name: str
    caption: str
    mask: npt.NDArray[np.bool_]

    def prompts(self) -> Prompts:
        """Return the prompt as ``Prompts`` of one region."""
        if self.prompt == BOX:
            return Prompts.from_boxes([np.ravel(self.points)])
        if self.prompt == SKETCH:
            return Prompts.from_sketches([self.points])
        return Prompts.from_points([[[*point, PointLabel.FOREGROUND] for point in self.points]])

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, with the mask as COCO run lengths."""
        return dataclasses.asdict(self) | {"mask": rle_from_mask(self.mask)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SampleRegion:
        """Build a region from the output of ``to_dict``."""
        points = tuple((float(x), float(y)) for x, y in values["points"])
        return cls(**values | {"points": points, "mask": mask_from_rle(values["mask"])})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """A sample picture with one prompt per object.

    Attributes:
        picture: path of the picture.
        seed: seed of the scene it shows, split "test".
        regions: prompts with ground truth, one per object.
    """

    picture: Path
    seed: int
    regions: tuple[SampleRegion, ...]

    def prompts(self) -> Prompts:
        """Return the prompts of all regions, in order."""
        return Prompts.concatenate([region.prompts() for region in self.regions])


def load_samples(folder: Path | None = None) -> tuple[Sample, ...]:
    """Load the sample pictures shipped with the package, or those of another folder.

    Raises:
        InputError: the samples are missing or cannot be read.
    """
    folder = DemoModel().samples if folder is None else folder
    path = folder / SAMPLES_FILE
    try:
        content = read_json(path)
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
            f"sample pictures cannot be read from {path} ({exc!r}); reinstall this package"
        ) from exc


def save_samples(samples: tuple[Sample, ...], folder: Path, about: dict[str, str]) -> None:
    """Write ``samples.json``, which ``load_samples`` reads.

    The strokes of each picture are also written to ``NAME.sketch.json`` next to it, for
    ``tap-export run --sketch``.

    Args:
        samples: samples whose pictures are already in ``folder``.
        folder: output folder.
        about: origin and licence of the pictures, stored in the file.
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
