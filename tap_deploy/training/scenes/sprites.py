"""Sprites: glyphs as they come into a scene, in some size, turn, mirroring and colour."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
from PIL import Image

from tap_deploy.training.scenes.colors import COLOR_WORDS, color_shares
from tap_deploy.training.scenes.emoji import Glyph

_HUE_JITTER = 4 / 360  # of objects that are known by their colour; turns
_TURN_DEGREES = 30.0
_COLORED_SHARE = 0.55  # an object has a colour if so much of it can be of one
_TOLD_SHARE = 0.45  # of what is visible; half as much of any other colour is still allowed
_SOLID = 128  # alpha from which a pixel belongs to the object
_TRIES = 8
_HUES_TO_LOOK_AT = 12
_LEVELS = np.arange(256)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sprite:
    """An object ready to be laid into a scene.

    Attributes:
        name: what a person calls it.
        name_index: place of the name in ``OBJECT_NAMES``.
        pixels: uint8 [h, w, 4] RGBA, not premultiplied.
        mask: bool [h, w], where the object is at least half opaque.
        colored: whether its caption tells a colour.
    """

    name: str
    name_index: int
    pixels: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]
    colored: bool


def is_colored(glyph: Glyph) -> bool:
    """Tell whether the object has one colour: mostly red, say, or mostly any one word.

    An object that may be painted has one if it has in any of its paints.
    """
    levels, solid = _levels(Image.fromarray(glyph.pixels)), glyph.pixels[..., 3] >= _SOLID
    turns = np.arange(_HUES_TO_LOOK_AT) / _HUES_TO_LOOK_AT if glyph.any_color else np.zeros(1)
    largest = [color_shares(_painted(levels, turn, 1.0, 1.0)[solid]).max() for turn in turns]
    return float(max(largest)) >= _COLORED_SHARE


def color_word(pixels: npt.NDArray[np.uint8]) -> str | None:
    """Return the colour of an object that has one, or None if it is not clear.

    Args:
        pixels: uint8 [n, 3] RGB, the visible pixels.
    """
    shares = color_shares(pixels)
    first = int(shares.argmax())
    if shares[first] < _TOLD_SHARE or np.delete(shares, first).max() > shares[first] / 2:
        return None
    return COLOR_WORDS[first]


def draw_sprite(
    glyph: Glyph, colored: bool, long_side: float, rng: np.random.Generator
) -> Sprite | None:
    """Return the glyph with a box of ``long_side`` pixels, and the rest by chance.

    Args:
        glyph: the object.
        colored: whether a colour must be clear; see ``is_colored``.
        long_side: pixels along the longer side of its box.
        rng: what to draw from.

    Returns:
        The sprite, or None if no clear colour was found.
    """
    image = Image.fromarray(glyph.pixels).convert("RGBa")  # so that edges mix as they should
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle = rng.uniform(-_TURN_DEGREES, _TURN_DEGREES)
    image = _cut(image.rotate(angle, Image.Resampling.BILINEAR, expand=True))
    scale = long_side / max(image.size)  # now that it is turned, so that the size is exact
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
    """Return the part of an image with alpha that its solid pixels span."""
    solid = image.getchannel(3).point((255 * (_LEVELS >= _SOLID)).tolist())
    return image.crop(solid.getbbox())


def _levels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return hue, saturation and value of an RGBA image, uint8 [h, w, 3]."""
    return np.asarray(image.convert("RGB").convert("HSV"))


def _painted(
    levels: npt.NDArray[np.uint8], hue_turns: float, saturation: float, brightness: float
) -> npt.NDArray[np.uint8]:
    """Return RGB, uint8 [h, w, 3], with the hue turned and the rest times a factor each."""
    hue = levels[..., 0] + np.uint8(round(hue_turns * 256) % 256)  # and starts again after 255
    scaled = [
        np.minimum(_LEVELS * factor, 255).astype(np.uint8)[levels[..., channel]]
        for channel, factor in ((1, saturation), (2, brightness))
    ]
    bands = [Image.fromarray(np.ascontiguousarray(band)) for band in (hue, *scaled)]
    return np.asarray(Image.merge("HSV", bands).convert("RGB"))
