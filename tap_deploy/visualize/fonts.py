"""Fonts of an overlay: Pillow's own, one that the caller names, those of the system."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import typing

from PIL import ImageFont

from tap_deploy.errors import InputError
from tap_deploy.machine.host import run_command

_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
)
_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
# In names of files whose letters look unlike those of a label; they are tried last.
_STYLES = ("bold", "black", "condensed", "italic", "light", "mono", "oblique", "serif", "thin")
_PLACEHOLDERS = "lastresort"  # fonts that have a box for every character there is

_PROBE_PIXELS = 48  # large enough that 口 and the box of a missing glyph differ
_UNUSUAL_PIXELS = 331  # no letters that are stored as pixels come in this size
_UNASSIGNED = "\U0010ffff"  # no font has it: what is drawn for it stands for any missing glyph


@dataclasses.dataclass(frozen=True)
class FontFile:
    """Where a font is.

    Attributes:
        path: of the file; empty for the one that Pillow brings along.
        index: of the font in a collection; from bit 16 on, of the instance of a variable font.
    """

    path: str
    index: int = 0


DEFAULT_FONT = FontFile("")


def font_from_path(path: str | os.PathLike[str]) -> FontFile:
    """Return the font in a file, the first one of a collection.

    Raises:
        InputError: there is no such file, or no font in it whose letters come in any size.
    """
    file = FontFile(os.fspath(path))
    try:
        _load(file, _UNUSUAL_PIXELS, ImageFont.Layout.BASIC)
    except (OSError, ValueError) as exc:  # ValueError: a path with a zero byte
        raise InputError(
            f"font {file.path} cannot be read: {exc}; expected a TrueType or OpenType file "
            "(.ttf, .otf or .ttc) with outlines"
        ) from exc
    return file


@functools.lru_cache(maxsize=512)
def open_font(
    file: FontFile, pixels: int, layout: ImageFont.Layout | None = None
) -> ImageFont.FreeTypeFont | None:
    """Return a font in a size, laid out by the best means there is; None if it cannot be read."""
    try:
        return _load(file, pixels, layout)
    except OSError:
        return None


@functools.lru_cache(maxsize=1 << 16)
def has_glyph(file: FontFile, character: str) -> bool:
    """Whether a font draws a character as anything but nothing, or the box of a missing glyph."""
    # Basic layout: no dotted circle comes to a mark that stands alone, no glyph goes away.
    font = open_font(file, _PROBE_PIXELS, ImageFont.Layout.BASIC)
    if font is None:
        return False
    drawn = _drawn(font, character)
    return drawn is not None and drawn != _drawn(font, _UNASSIGNED)


@functools.lru_cache(maxsize=1)
def system_fonts() -> tuple[FontFile, ...]:
    """Return the fonts of this machine, those to prefer first.

    fontconfig tells its order for sans-serif text, less what has no character of its own.
    Without it, all files in the usual folders.
    """
    command = ["fc-match", "--sort", "--format", "%{file}|%{index}\n", "sans-serif"]
    listed = [line.rpartition("|") for line in run_command(command).output.splitlines()]
    files = [FontFile(path, int(index)) for path, _, index in listed if index.isdecimal()]
    if not files:
        files = [FontFile(str(path)) for folder in _FOLDERS for path in _fonts_below(folder)]
    return tuple(file for file in files if _PLACEHOLDERS not in file.path.lower())


def _fonts_below(folder: str) -> list[pathlib.Path]:
    places = os.walk(os.path.expanduser(folder))  # what cannot be read is left out
    paths = [pathlib.Path(place, name) for place, _, names in places for name in names]
    fonts = [path for path in paths if path.suffix.lower() in _SUFFIXES]
    return sorted(fonts, key=_by_style)


def _by_style(path: pathlib.Path) -> tuple[int, bool, pathlib.Path]:
    name = path.stem.lower()
    return sum(style in name for style in _STYLES), "sans" not in name, path


def _load(file: FontFile, pixels: int, layout: ImageFont.Layout | None) -> ImageFont.FreeTypeFont:
    if file == DEFAULT_FONT:
        font = typing.cast(ImageFont.FreeTypeFont, ImageFont.load_default(pixels))
        return font if layout is None else font.font_variant(layout_engine=layout)
    # Not ImageFont.truetype: in place of a broken file it takes another one of the same name.
    font = ImageFont.FreeTypeFont(file.path, pixels, file.index, layout_engine=layout)
    if not file.index >> 16:
        _make_regular(font)
    return font


def _make_regular(font: ImageFont.FreeTypeFont) -> None:
    """Set a variable font to its regular weight: as it is opened, it may be a hair line."""
    try:
        if b"Regular" in font.get_variation_names():
            font.set_variation_by_name(b"Regular")
    except OSError:
        return  # not a variable font


def _drawn(font: ImageFont.FreeTypeFont, character: str) -> tuple[typing.Any, ...] | None:
    """Return what a character looks like; None if nothing is to be seen, or it is broken."""
    try:
        mask, offset = font.getmask2(character)
        return (bytes(mask), mask.size, offset) if mask.getbbox() else None
    except OSError:
        return None
