"""Glyphs: pictures of objects from the Noto Color Emoji font.

The font (SIL Open Font License 1.1) is read from the system and not distributed; its licence does
not apply to documents made with it, such as these pictures.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from tap_deploy.errors import InputError
from tap_deploy.training.scenes.emoji_names import ANY_COLORED_CHARACTERS, CHARACTERS, OBJECT_NAMES

FONT_VARIABLE = "TAP_EMOJI_FONT"
DEBIAN_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
_FONT_PIXELS = 109  # the only bitmap size of this font
_CANVAS = (192, 192)  # width and height; the bitmaps are 136 x 128
_HINT = f"apt-get install fonts-noto-color-emoji, or set {FONT_VARIABLE} to the .ttf file"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Glyph:
    """A picture of an object.

    Attributes:
        name: common name of the object.
        name_index: index of the name in ``OBJECT_NAMES``.
        pixels: picture cropped to its visible part, up to 136 pixels per side, not premultiplied,
            RGBA uint8 [h, w, 4].
        any_color: the object may have any colour, so its hue may be changed.
    """

    name: str
    name_index: int
    pixels: npt.NDArray[np.uint8]
    any_color: bool


def emoji_font_path() -> Path:
    """Return the path of the font: ``$TAP_EMOJI_FONT``, or that of Debian.

    Raises:
        InputError: the file does not exist.
    """
    path = Path(os.environ.get(FONT_VARIABLE) or DEBIAN_FONT)
    if not path.is_file():
        raise InputError(f"the Noto Color Emoji font is not at {path}; {_HINT}")
    return path


def load_glyphs(characters: Mapping[str, str] = CHARACTERS) -> tuple[Glyph, ...]:
    """Return a glyph for every character, in order; this takes 0.25 s.

    Args:
        characters: character -> name; all names must be in ``OBJECT_NAMES``.

    Raises:
        InputError: the font is missing or unsuitable, or lacks a character.
    """
    path = emoji_font_path()
    try:
        # Single characters need no shaping, and basic layout is the same in every Pillow version.
        font = ImageFont.truetype(path, _FONT_PIXELS, layout_engine=ImageFont.Layout.BASIC)
    except OSError as exc:
        raise InputError(f"font {path} cannot be used at {_FONT_PIXELS} pixels; {_HINT}") from exc
    return tuple(
        Glyph(
            name=name,
            name_index=OBJECT_NAMES.index(name),
            pixels=_pixels_from_character(font, character, name, path),
            any_color=character in ANY_COLORED_CHARACTERS,
        )
        for character, name in characters.items()
    )


def _pixels_from_character(
    font: ImageFont.FreeTypeFont, character: str, name: str, path: Path
) -> npt.NDArray[np.uint8]:
    canvas = Image.new("RGBA", _CANVAS)
    ImageDraw.Draw(canvas).text((16, 16), character, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None or canvas.convert("RGB").getextrema() == ((0, 0),) * 3:
        raise InputError(
            f"font {path} has no colour bitmap for {character!r} ({name}); expected Noto Color "
            f"Emoji with Unicode 13 or later: {_HINT}"
        )
    return np.asarray(canvas.crop(box))
