"""Backgrounds of scenes: crops of photographs and coloured textures, different per split."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tap_deploy.errors import InputError
from tap_deploy.training.scenes import textures
from tap_deploy.training.scenes.photographs import Photograph, load_photographs

# Splits share no texture, so that test scenes influence neither training nor model selection.
TEXTURES: dict[str, tuple[textures.Texture, ...]] = {
    "train": (
        textures.ramp,
        textures.clouds,
        textures.grain,
        textures.stripes,
        textures.checks,
        textures.dots,
        textures.cells,
        textures.leaves,
    ),
    "validation": (textures.glow, textures.plaid),
    "test": (textures.wood, textures.tiles, textures.ripples),
}
SPLITS: tuple[str, ...] = tuple(TEXTURES)

_PHOTOGRAPH_SHARE = 0.5
_SMALLEST_CROP = 120  # pixels of the photograph along one side of the picture


class Backgrounds:
    """Draws the backgrounds of one split.

    Raises:
        InputError: the split is unknown.
        MissingDependencyError: the photographs are not installed.
    """

    def __init__(self, split: str) -> None:
        if split not in TEXTURES:
            raise InputError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        self._textures = TEXTURES[split]
        self._photographs = load_photographs(split)

    def draw(self, rng: np.random.Generator, size: int) -> npt.NDArray[np.uint8]:
        """Return a background, uint8 [size, size, 3] RGB."""
        if rng.random() < _PHOTOGRAPH_SHARE:
            photograph = self._photographs[rng.integers(len(self._photographs))]
            return _crop_of_photograph(photograph, rng, size)
        texture = self._textures[rng.integers(len(self._textures))]
        return _colored(texture(rng, size), rng)


def _crop_of_photograph(
    photograph: Photograph, rng: np.random.Generator, size: int
) -> npt.NDArray[np.uint8]:
    """Return a random square crop of a photograph, randomly mirrored and recoloured."""
    height, width = photograph.shape[:2]
    side = rng.uniform(_SMALLEST_CROP, min(height, width))
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    image = Image.fromarray(photograph).resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    crop: npt.NDArray[np.float32] = np.asarray(image, np.float32) / np.float32(255)
    if crop.ndim == 2:
        return _colored(crop, rng)
    return _bytes(crop * rng.uniform(0.75, 1.25, 3) * rng.uniform(0.8, 1.2))  # vary the lighting


def _colored(field: textures.Field, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return a field coloured with a random gradient of three colours."""
    stops = np.array([_color(rng) for _ in range(3)])
    if rng.random() < 0.3:  # shades of one colour, as on most surfaces
        stops = stops[0] * rng.uniform(0.5, 1.2, (3, 1))
    places = np.linspace(0, 1, len(stops))
    steps = np.linspace(0, 1, 256)
    table = np.stack([np.interp(steps, places, channel) for channel in stops.T], axis=1)
    shades = _bytes(table)  # [256, 3]
    return shades[(field * 255).astype(np.uint8)]


def _color(rng: np.random.Generator) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.75), rng.uniform(0.25, 0.95))


def _bytes(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    levels: npt.NDArray[np.uint8] = (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)
    return levels
