"""Sprites: glyphs with a random size, rotation, mirroring and colour."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
from PIL import Image

from tap_deploy.training.scenes.colors import COLOR_WORDS, color_shares
from tap_deploy.training.scenes.emoji import Glyph

_HUE_JITTER = 4 / 360  # hue shift of objects with a characteristic colour, turns
_TURN_DEGREES = 30.0
_COLORED_SHARE = 0.55  # minimum fraction of one colour in an object that has a colour
_TOLD_SHARE = 0.45  # minimum visible fraction of a colour in a caption; others at most half of it
_SOLID = 128  # minimum alpha of pixels of the object
_TRIES = 8
_HUES_TO_LOOK_AT = 12
_LEVELS = np.arange(256)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sprite:
    """An object to place in a scene.

    Attributes:
        name: common name of the object.
        name_index: index of the name in ``OBJECT_NAMES``.
        pixels: picture, not premultiplied, RGBA uint8 [h, w, 4].
        mask: pixels with an alpha of at least one half, bool [h, w].
        colored: the caption gives a colour.
    """

    name: str
    name_index: int
    pixels: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]
    colored: bool


def is_colored(glyph: Glyph) -> bool:
    """Return whether the object has one main colour.

    An object that may have any colour needs a main colour in one of its hues.
    """
    levels, solid = _levels(Image.fromarray(glyph.pixels)), glyph.pixels[..., 3] >= _SOLID
    turns = np.arange(_HUES_TO_LOOK_AT) / _HUES_TO_LOOK_AT if glyph.any_color else np.zeros(1)
    largest = [color_shares(_painted(levels, turn, 1.0, 1.0)[solid]).max() for turn in turns]
    return float(max(largest)) >= _COLORED_SHARE


def color_word(pixels: npt.NDArray[np.uint8]) -> str | None:
    """Return the main colour of an object, or None if it is unclear.

    Args:
        pixels: visible pixels, RGB uint8 [n, 3].
    """
    shares = color_shares(pixels)
    first = int(shares.argmax())
    if shares[first] < _TOLD_SHARE or np.delete(shares, first).max() > shares[first] / 2:
        return None
    return COLOR_WORDS[first]


def draw_sprite(
    glyph: Glyph, colored: bool, long_side: float, rng: np.random.Generator
) -> Sprite | None:
    """Return a glyph as a sprite of a given size, with random rotation, mirroring and colour.

    Args:
        glyph: the object.
        colored: the sprite must have a clear colour; see ``is_colored``.
        long_side: longer side of its box, pixels.
        rng: random generator.

    Returns:
        The sprite, or None if no clear colour was found.
    """
    image = Image.fromarray(glyph.pixels).convert("RGBa")  # premultiplied, to interpolate edges
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle = rng.uniform(-_TURN_DEGREES, _TURN_DEGREES)
    image = _cut(image.rotate(angle, Image.Resampling.BILINEAR, expand=True))
    scale = long_side / max(image.size)  # after the rotation, so that the size is exact
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    image = image.resize(size, Image.Resampling.BICUBIC).convert("RGBA")
    levels, alpha = _levels(image), np.asarray(image.getchannel("A"))
    mask = alpha >= _SOLID
    for _ in range(_TRIES):
        turn = rng.uniform(0, 1) if glyph.any_color else rng.uniform(-_HUE_JITTER, _HUE_JITTER)
        pixels = _painted(levels, turn, rng.uniform(0.85, 1.1), rng.uniform(0.85, 1.1))
        if not colored or color_word(pixels[mask]):
            return Sprite(
                name=glyph.name,
                name_index=glyph.name_index,
                pixels=np.dstack([pixels, alpha]),
                mask=mask,
                colored=colored,
            )
    return None


def _cut(image: Image.Image) -> Image.Image:
    """Return an image with alpha, cropped to its solid pixels."""
    solid = image.getchannel(3).point((255 * (_LEVELS >= _SOLID)).tolist())
    return image.crop(solid.getbbox())


def _levels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return hue, saturation and value of an RGBA image, uint8 [h, w, 3]."""
    return np.asarray(image.convert("RGB").convert("HSV"))


def _painted(
    levels: npt.NDArray[np.uint8], hue_turns: float, saturation: float, brightness: float
) -> npt.NDArray[np.uint8]:
    """Return RGB uint8 [h, w, 3] with shifted hue and scaled saturation and brightness."""
    hue = levels[..., 0] + np.uint8(round(hue_turns * 256) % 256)  # wraps around at 256
    scaled = [
        np.minimum(_LEVELS * factor, 255).astype(np.uint8)[levels[..., channel]]
        for channel, factor in ((1, saturation), (2, brightness))
    ]
    bands = [Image.fromarray(np.ascontiguousarray(band)) for band in (hue, *scaled)]
    return np.asarray(Image.merge("HSV", bands).convert("RGB"))
