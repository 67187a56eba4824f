"""Fonts of an overlay: Pillow's default font, a font file of the caller, system fonts."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import typing

from PIL import ImageFont

from tap_deploy.errors import InputError
from tap_deploy.machine.host import run_command
from tap_deploy.storage.regular_files import open_regular

_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
)
_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
# Fonts with these words in their file name differ from the label style and are tried last.
_STYLES = ("bold", "black", "condensed", "italic", "light", "mono", "oblique", "serif", "thin")
_PLACEHOLDERS = "lastresort"  # fonts that draw a box for every character

_PROBE_PIXELS = 48  # large enough to tell 口 from the box of a missing glyph
_UNUSUAL_PIXELS = 331  # bitmap fonts do not have this size
_UNASSIGNED = "\U0010ffff"  # in no font: it is drawn as the missing glyph


@dataclasses.dataclass(frozen=True)
class FontFile:
    """Location of a font.

    Attributes:
        path: path of the font file; empty for Pillow's default font.
        index: index of the font in a collection; bits 16 and up give the named instance of a
            variable font.
    """

    path: str
    index: int = 0


DEFAULT_FONT = FontFile("")


def font_from_path(path: str | os.PathLike[str]) -> FontFile:
    """Return the font in a file, the first one of a collection.

    Raises:
        InputError: the file does not exist, or contains no scalable font.
    """
    file = FontFile(os.fspath(path))
    try:
        open_regular(path).close()  # FreeType would wait for a pipe
        _load(file, _UNUSUAL_PIXELS, ImageFont.Layout.BASIC)
    except (OSError, ValueError) as exc:  # ValueError: a path with a NUL byte
        raise InputError(
            f"font {file.path} cannot be read: {exc}; expected a TrueType or OpenType file "
            "(.ttf, .otf or .ttc) with outlines"
        ) from exc
    return file


@functools.lru_cache(maxsize=512)
def open_font(
    file: FontFile, pixels: int, layout: ImageFont.Layout | None = None
) -> ImageFont.FreeTypeFont | None:
    """Return a font in a size, by default with the best layout engine; None if unreadable."""
    try:
        return _load(file, pixels, layout)
    except OSError:
        return None


@functools.lru_cache(maxsize=1 << 16)
def has_glyph(file: FontFile, character: str) -> bool:
    """Whether a font has a visible glyph for a character."""
    # Raqm adds a dotted circle to a lone combining mark and drops some glyphs; basic does not.
    font = open_font(file, _PROBE_PIXELS, ImageFont.Layout.BASIC)
    if font is None:
        return False
    drawn = _drawn(font, character)
    return drawn is not None and drawn != _drawn(font, _UNASSIGNED)


@functools.lru_cache(maxsize=1)
def system_fonts() -> tuple[FontFile, ...]:
    """Return the system fonts, preferred fonts first.

    The order is that of fontconfig for sans-serif text, which leaves out fonts that add no
    character. Without fontconfig, all font files in the standard folders are used.
    """
    command = ["fc-match", "--sort", "--format", "%{file}|%{index}\n", "sans-serif"]
    listed = [line.rpartition("|") for line in run_command(command).output.splitlines()]
    files = [FontFile(path, int(index)) for path, _, index in listed if index.isdecimal()]
    if not files:
        files = [FontFile(str(path)) for folder in _FOLDERS for path in _fonts_below(folder)]
    return tuple(file for file in files if _PLACEHOLDERS not in file.path.lower())


def _fonts_below(folder: str) -> list[pathlib.Path]:
    places = os.walk(os.path.expanduser(folder))  # skips unreadable folders
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
    # ImageFont.truetype replaces a corrupt file by a system font of the same file name.
    font = ImageFont.FreeTypeFont(file.path, pixels, file.index, layout_engine=layout)
    if not file.index >> 16:
        _make_regular(font)
    return font


def _make_regular(font: ImageFont.FreeTypeFont) -> None:
    """Set a variable font to its regular weight; its default may be the thinnest."""
    try:
        if b"Regular" in font.get_variation_names():
            font.set_variation_by_name(b"Regular")
    except OSError:
        return  # not a variable font


def _drawn(font: ImageFont.FreeTypeFont, character: str) -> tuple[typing.Any, ...] | None:
    """Return the bitmap, size and offset of a character; None if it is empty or unreadable."""
    try:
        mask, offset = font.getmask2(character)
        return (bytes(mask), mask.size, offset) if mask.getbbox() else None
    except OSError:
        return None
