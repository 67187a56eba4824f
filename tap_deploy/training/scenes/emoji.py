"""Glyphs: pictures of objects, cut from the Noto Color Emoji font.

The font (SIL Open Font License 1.1) stays where the system keeps it; pictures that are made with
it are documents, which its licence leaves free.
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
_FONT_PIXELS = 109  # the only size that the bitmaps of this font come in
_CANVAS = (192, 192)  # width and height with room to spare: the bitmaps are 136 x 128
_HINT = f"apt-get install fonts-noto-color-emoji, or set {FONT_VARIABLE} to the .ttf file"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Glyph:
    """One picture of an object.

    Attributes:
        name: what a person calls it.
        name_index: place of the name in ``OBJECT_NAMES``.
        pixels: uint8 [h, w, 4] RGBA, not premultiplied, cut to what can be seen; the longer side
            has up to 136 pixels.
        any_color: the object comes in any colour, so that its hue may be turned.
    """

    name: str
    name_index: int
    pixels: npt.NDArray[np.uint8]
    any_color: bool


def emoji_font_path() -> Path:
    """Return where the font is: ``$TAP_EMOJI_FONT``, or Debian's place.

    Raises:
        InputError: there is no such file.
    """
    path = Path(os.environ.get(FONT_VARIABLE) or DEBIAN_FONT)
    if not path.is_file():
        raise InputError(f"the Noto Color Emoji font is not at {path}; {_HINT}")
    return path


def load_glyphs(characters: Mapping[str, str] = CHARACTERS) -> tuple[Glyph, ...]:
    """Return a glyph for every character, in their order; this takes a quarter of a second.

    Args:
        characters: character -> name; the names are among ``OBJECT_NAMES``.

    Raises:
        InputError: the font is missing, of another kind, or lacks a character.
    """
    path = emoji_font_path()
    try:
        # Basic layout: one character needs no shaping, and gives the same with every Pillow.
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
