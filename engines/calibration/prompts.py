"""Prompts for calibration pictures: random ones, or those of a file."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from tap_deploy.config import PointLabel
from tap_deploy.errors import InputError
from tap_deploy.prompts import Prompts
from tap_deploy.storage.json_files import parse_json
from tap_deploy.storage.regular_files import TEXT_BYTES, read_bytes

BOXES, POINTS, SKETCHES = "boxes", "points", "sketches"
KINDS = (BOXES, POINTS, SKETCHES)
# Prompts per picture and kind; more of them cost time in the decoders only.
NUM_BOXES, NUM_POINTS, NUM_SKETCHES = 4, 4, 2
STROKE_POINTS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationPrompts:
    """The source of the prompts.

    Attributes:
        own: file name of a picture -> kind -> values; pictures without an entry get random prompts.
        digest: SHA-256 of the prompts file; empty without one.
        seed: seed of the random prompts.
    """

    own: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    digest: str = ""
    seed: int = 0

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, seed: int = 0) -> CalibrationPrompts:
        """Load prompts from JSON: file name of a picture -> boxes, points, sketches.

        Format: ``{"street.jpg": {"boxes": [[x0, y0, x1, y1]], "points": [[[x, y, 1]]],
        "sketches": [[[x, y], …]]}}``, in pixels of the picture. Pictures without an entry get
        random prompts.

        Raises:
            InputError: the file cannot be read, or has another structure.
        """
        try:
            data = read_bytes(path, TEXT_BYTES)
            values = parse_json(data)
        except (OSError, ValueError) as exc:
            raise InputError(f"prompts {path} cannot be read as JSON: {exc}") from exc
        if not isinstance(values, dict) or not values:
            raise InputError(f"prompts {path}: expected an object, name of a picture -> prompts")
        for name, kinds in values.items():
            if not isinstance(kinds, dict) or not kinds or set(kinds) - set(KINDS):
                raise InputError(f"prompts {path}: {name} expects some of {', '.join(KINDS)}")
        return cls(own=values, digest=hashlib.sha256(data).hexdigest(), seed=seed)

    @property
    def fingerprint(self) -> str:
        """Identifier of everything that the prompts depend on besides the picture."""
        return f"{self.digest}:{self.seed}:{NUM_BOXES}:{NUM_POINTS}:{NUM_SKETCHES}"

    def for_image(self, path: pathlib.Path, digest: str, width: int, height: int) -> list[Prompts]:
        """Return the prompts of a picture, one ``Prompts`` per kind.

        Kinds are separate, because all prompts of a call are padded to the same number of points,
        and results depend on that number.

        Args:
            path: the picture, looked up by its file name.
            digest: SHA-256 of the picture; with the seed, it determines random prompts.
            width: width of the picture, pixels.
            height: height of the picture, pixels.

        Raises:
            InputError: a prompt from the file does not fit the picture.
        """
        own = self.own.get(path.name)
        if own is None:
            return drawn_prompts(
                np.random.default_rng([self.seed, int(digest[:15], 16)]), width, height
            )
        makers = {
            BOXES: Prompts.from_boxes,
            POINTS: Prompts.from_points,
            SKETCHES: Prompts.from_sketches,
        }
        prompts = [makers[kind](values) for kind, values in own.items()]
        for part in prompts:
            part.check(width, height)
        return [part for part in prompts if len(part)]


def drawn_prompts(rng: np.random.Generator, width: int, height: int) -> list[Prompts]:
    """Return random boxes, points and sketches of all sizes and positions.

    They cover the three ways to prompt the model: a single box, a single point, a curved stroke.
    """
    size = np.array([width - 1, height - 1], np.float64)
    return [
        Prompts.from_boxes(_boxes(rng, size)),
        Prompts.from_points(_points(rng, size)),
        Prompts.from_sketches([_stroke(rng, size) for _ in range(NUM_SKETCHES)]),
    ]


def _boxes(rng: np.random.Generator, size: np.ndarray) -> np.ndarray:
    # Log-uniform sides from a tenth of the picture to all of it: small boxes are as frequent as
    # large ones.
    sides = np.exp(rng.uniform(np.log(0.1), 0.0, (NUM_BOXES, 2))) * size
    sides = np.maximum(sides, np.minimum(size, 1.0))
    corners = rng.uniform(0.0, 1.0, (NUM_BOXES, 2)) * (size - sides)
    return np.concatenate([corners, corners + sides], axis=1)


def _points(rng: np.random.Generator, size: np.ndarray) -> np.ndarray:
    places = rng.uniform(0.0, 1.0, (NUM_POINTS, 2)) * size
    labels = np.full((NUM_POINTS, 1), float(PointLabel.FOREGROUND))
    return np.concatenate([places, labels], axis=1)[:, None]  # [P, 1, 3]


def _stroke(rng: np.random.Generator, size: np.ndarray) -> np.ndarray:
    """Return a random quadratic Bézier curve, float64 [STROKE_POINTS, 2]."""
    start, bend, end = rng.uniform(0.0, 1.0, (3, 2)) * size
    t = np.linspace(0.0, 1.0, STROKE_POINTS)[:, None]
    stroke: np.ndarray = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
    return stroke
