"""Measures and draws text, with fallback fonts for characters that a font lacks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import re
from collections.abc import Iterator, Sequence
from typing import Literal

from PIL import ImageDraw, ImageFont, features

from tap_deploy.visualize.colors import Color
from tap_deploy.visualize.fonts import (
    DEFAULT_FONT,
    FontFile,
    has_glyph,
    open_font,
    system_fonts,
)
from tap_deploy.visualize.writing import (
    clusters,
    directions,
    has_leftward,
    is_letter,
    kind_and_package,
    needs_glyph,
    needs_shaping,
    without_marks,
)

logger = logging.getLogger(__name__)

_LEADING = 1.22  # line height in Pillow's default font, in heights of its letters
_TALL_LEADING = 1.15  # line height of lines with taller glyphs, in heights of those
_Part = tuple[str, FontFile]


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run of characters in one font and one direction.

    Attributes:
        text: the characters, in reading order.
        file: the font.
        direction: reading direction; None if the line has no right-to-left text.
    """

    text: str
    file: FontFile
    direction: Literal["ltr", "rtl"] | None = None


class Typeface:
    """Measures and draws lines of text in any script.

    Characters that Pillow's default font lacks are taken from the system fonts. If no font has
    one, a box is drawn, and a warning names the package with such a font, once per process.

    Args:
        pixels: font size, pixels.
        font: font to use before Pillow's default font.
    """

    def __init__(self, pixels: int, font: FontFile | None = None) -> None:
        self._pixels = pixels
        self._first: tuple[FontFile, ...] = (
            (DEFAULT_FONT,) if font is None else (font, DEFAULT_FONT)
        )
        self._damaged: frozenset[FontFile] = frozenset()
        default = self._font(_Run("", DEFAULT_FONT))
        _, top, _, bottom = default.getbbox("Ág")
        self._height = math.ceil((bottom - top) * _LEADING)
        # Distance from the middle of a line down to its baseline.
        self._drop = default.getbbox("x", anchor="lm")[3] - default.getbbox("x", anchor="ls")[3]

    def length(self, text: str) -> float:
        """Return the width of a line, pixels."""
        return sum(map(self._length, self._runs(text)))

    def line_height(self, texts: Sequence[str] = ()) -> int:
        """Return the line height that fits these texts, pixels.

        A font that turns out to be corrupt is not used again.
        """
        height: float = self._height
        for run in itertools.chain.from_iterable(map(self._runs, texts)):
            if run.file == DEFAULT_FONT:
                continue
            try:
                mask, (_, top) = self._font(run).getmask2(
                    run.text, anchor="ls", direction=run.direction
                )
            except OSError:
                self._damaged |= {run.file}
                self._first = tuple(file for file in self._first if file != run.file)
                return self.line_height(texts)
            # Extent from the middle of the line.
            reach = max(-self._drop - top, self._drop + top + mask.size[1])
            height = max(height, _TALL_LEADING * 2 * reach)
        return math.ceil(min(height, 2 * self._height))  # stacked marks have no limit

    def draw(
        self,
        draw: ImageDraw.ImageDraw,
        place: tuple[float, float],
        text: str,
        color: Color,
        *,
        leftward: bool = False,
    ) -> None:
        """Draw a line.

        Args:
            draw: Pillow's drawing context of the picture.
            place: middle of the left edge of the line, XY in pixels.
            text: the line.
            color: RGB 0..255.
            leftward: the line is part of a right-to-left paragraph.
        """
        x, y = place[0], place[1] + self._drop
        for run in self._runs(text, leftward=leftward):
            draw.text((x, y), run.text, color, self._font(run), "ls", direction=run.direction)
            x += self._length(run)

    def _length(self, run: _Run) -> float:
        return self._font(run).getlength(run.text, direction=run.direction)

    def _font(self, run: _Run) -> ImageFont.FreeTypeFont:
        # Pillow uses Raqm for its default font only on request, for other fonts always.
        layout = ImageFont.Layout.RAQM if run.direction else None
        font = open_font(run.file, self._pixels, layout)
        assert font is not None  # unreadable fonts are never chosen
        return font

    def _runs(self, text: str, *, leftward: bool = False) -> list[_Run]:
        """Split a line into runs, from left to right."""
        can_shape = features.check_feature("raqm")
        if not can_shape and needs_shaping(text):
            _warn_of_shapes()
            text = "".join(c for c in text if c == " " or needs_glyph(c))
        parts = self._parts(text)
        if not can_shape or not (leftward or has_leftward(text)):
            return [_Run(*part) for part in parts]
        if len(parts) == 1:  # Raqm reorders text in a single font
            return [_Run(*parts[0], "rtl" if leftward else "ltr")]
        return _in_order(parts, leftward=leftward)

    def _parts(self, text: str) -> list[_Part]:
        """Split a text where the font changes; if possible, a word stays in one font."""
        if _has_all(self._first[0], _needed(text)):
            return [(text, self._first[0])]
        parts: list[_Part] = []
        whole = self._file_with(_letters(text))
        for unit in [text] if whole else re.findall(r"\S+\s*|\s+", text):
            preferred = whole or self._file_with(_letters(unit))
            parts += [self._part(cluster, preferred) for cluster in clusters(unit)]
        joined = itertools.groupby(parts, key=lambda part: part[1])
        return [("".join(text for text, _ in group), file) for file, group in joined]

    def _part(self, cluster: str, preferred: FontFile | None) -> _Part:
        """Return a cluster and a font for it; marks that no font has are dropped."""
        needed = _needed(cluster)
        if preferred is not None and _has_all(preferred, needed):
            return cluster, preferred
        file = self._file_with(needed)
        if file is not None:
            return cluster, file
        missing = [c for c in cluster if self._file_with(_needed(c)) is None]
        _warn_of_glyphs(*kind_and_package(missing[0] if missing else cluster[0]))
        letter = without_marks(cluster)
        return letter, self._file_with(_needed(letter)) or DEFAULT_FONT

    def _file_with(self, characters: frozenset[str]) -> FontFile | None:
        return _file_with(self._first, self._damaged, self._pixels, characters)


def _needed(text: str) -> frozenset[str]:
    return frozenset(filter(needs_glyph, set(text)))


def _letters(text: str) -> frozenset[str]:
    return frozenset(filter(is_letter, set(text))) or _needed(text)


def _has_all(file: FontFile, characters: frozenset[str]) -> bool:
    return all(has_glyph(file, character) for character in characters)


@functools.lru_cache(maxsize=4096)
def _file_with(
    first: tuple[FontFile, ...],
    damaged: frozenset[FontFile],
    pixels: int,
    characters: frozenset[str],
) -> FontFile | None:
    """Return the first font that has all characters; None without one."""
    for file in _candidates(first):
        if file not in damaged and _has_all(file, characters) and open_font(file, pixels):
            return file
    return None


def _candidates(first: tuple[FontFile, ...]) -> Iterator[FontFile]:
    yield from first
    yield from system_fonts()  # looked up only if the first fonts do not suffice


def _in_order(parts: list[_Part], *, leftward: bool) -> list[_Run]:
    """Split parts where the direction changes, and return the runs in visual order."""
    text = "".join(part for part, _ in parts)
    files = [file for part, file in parts for _ in part]
    marked = zip(files, directions(text, leftward=leftward), text, strict=True)
    runs = [
        _Run("".join(character for *_, character in group), file, direction)
        for (file, direction), group in itertools.groupby(marked, key=lambda mark: mark[:2])
    ]
    # In a right-to-left group, and in a right-to-left line, the first run is rightmost.
    ordered = [
        list(neighbours)[:: -1 if direction == "rtl" else 1]
        for direction, neighbours in itertools.groupby(runs, key=lambda run: run.direction)
    ]
    return list(itertools.chain.from_iterable(ordered[:: -1 if leftward else 1]))


@functools.cache  # once per process
def _warn_of_glyphs(kind: str, package: str) -> None:
    logger.warning(
        "labels cannot show %s: no installed font has them; apt-get install %s, or pass a font "
        "file that has them",
        kind,
        package,
    )


@functools.cache
def _warn_of_shapes() -> None:
    logger.warning(
        "labels in complex or right-to-left scripts are drawn without text shaping: Pillow finds "
        "no FriBidi; apt-get install libfribidi0"
    )
