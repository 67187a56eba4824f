"""Letters of an overlay: each is drawn in a font that has it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import re
from collections.abc import Iterable, Iterator
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
    needs_glyph,
    needs_shaping,
    without_marks,
    writing_and_package,
)

logger = logging.getLogger(__name__)

_LINE_HEIGHT = 1.22  # of what a font draws
_Part = tuple[str, FontFile]


@dataclasses.dataclass(frozen=True)
class _Run:
    """Neighbours in one font that are read one way; no direction where no text is read leftward.

    ``text`` stands in the order in which it is read.
    """

    text: str
    file: FontFile
    direction: Literal["ltr", "rtl"] | None = None


class Typeface:
    """Measures and draws lines of text in any writing.

    What Pillow's own font lacks is looked for in the fonts of the system. If none has it a box is
    drawn, and a warning says, once, which package brings such a font.

    Args:
        pixels: size of the letters.
        font: a font to prefer to Pillow's own.
    """

    def __init__(self, pixels: int, font: FontFile | None = None) -> None:
        self._pixels = pixels
        self._first = (DEFAULT_FONT,) if font is None else (font, DEFAULT_FONT)
        default = self._font(DEFAULT_FONT)
        _, top, _, bottom = default.getbbox("Ág")
        self._height = math.ceil((bottom - top) * _LINE_HEIGHT)
        # From the middle of a line down to where its letters stand.
        self._drop = default.getbbox("x", anchor="lm")[3] - default.getbbox("x", anchor="ls")[3]

    def length(self, text: str) -> float:
        """Return how wide a line is, pixels."""
        return sum(map(self._length, self._runs(text)))

    def line_height(self, texts: Iterable[str] = ()) -> int:
        """Return the distance of lines in which these texts fit, pixels."""
        height: float = self._height
        for run in itertools.chain.from_iterable(map(self._runs, texts)):
            if run.file != DEFAULT_FONT:
                font = self._font(run.file)
                _, top, _, bottom = font.getbbox(run.text, anchor="ls", direction=run.direction)
                height = max(height, 2 * (-self._drop - top) + 2, 2 * (self._drop + bottom) + 2)
        return math.ceil(height)

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
            draw: draws on the picture.
            place: the middle of the left side of the line, XY in pixels.
            text: what it says.
            color: RGB 0..255.
            leftward: the paragraph that it is a line of is read from the right.
        """
        x, y = place[0], place[1] + self._drop
        for run in self._runs(text, leftward=leftward):
            font = self._font(run.file)
            draw.text((x, y), run.text, color, font, "ls", direction=run.direction)
            x += self._length(run)

    def _length(self, run: _Run) -> float:
        return self._font(run.file).getlength(run.text, direction=run.direction)

    def _font(self, file: FontFile) -> ImageFont.FreeTypeFont:
        font = open_font(file, self._pixels)
        assert font is not None  # no other one is chosen
        return font

    def _runs(self, text: str, *, leftward: bool = False) -> list[_Run]:
        """Cut a line into runs; the leftmost comes first."""
        can_shape = features.check_feature("raqm")
        if not can_shape and needs_shaping(text):
            _warn_of_shapes()
            text = "".join(c for c in text if c == " " or needs_glyph(c))
        parts = self._parts(text)
        if not can_shape or not (leftward or has_leftward(text)):
            return [_Run(*part) for part in parts]
        if len(parts) == 1:  # Raqm puts what is in one font in order
            return [_Run(*parts[0], "rtl" if leftward else "ltr")]
        return _in_order(parts, leftward=leftward)

    def _parts(self, text: str) -> list[_Part]:
        """Cut a text into what is in one font: all of it, else words, else characters."""
        parts: list[_Part] = []
        for unit in [text] if self._file_with(text) else re.findall(r"\S+\s*|\s+", text):
            file = self._file_with(unit)
            parts += [(unit, file)] if file else map(self._part, clusters(unit))
        joined = itertools.groupby(parts, key=lambda part: part[1])
        return [("".join(text for text, _ in group), file) for file, group in joined]

    def _part(self, cluster: str) -> _Part:
        """Find a font for a character; a mark that no font has is left out."""
        letter = without_marks(cluster)
        file = self._file_with(cluster)
        if file is not None:
            return cluster, file
        missing = next(c for c in cluster if needs_glyph(c) and self._file_with(c) is None)
        _warn_of_glyphs(*writing_and_package(missing))
        return letter, self._file_with(letter) or DEFAULT_FONT

    def _file_with(self, text: str) -> FontFile | None:
        return _file_with(self._first, self._pixels, frozenset(filter(needs_glyph, set(text))))


@functools.lru_cache(maxsize=4096)
def _file_with(
    first: tuple[FontFile, ...], pixels: int, characters: frozenset[str]
) -> FontFile | None:
    """Return the first font that has all characters; None if none has."""
    for file in _candidates(first):
        if all(has_glyph(file, c) for c in characters) and open_font(file, pixels):
            return file
    return None


def _candidates(first: tuple[FontFile, ...]) -> Iterator[FontFile]:
    yield from first
    yield from system_fonts()  # looked up only if the first ones do not do


def _in_order(parts: list[_Part], *, leftward: bool) -> list[_Run]:
    """Cut parts where the direction changes, and put them in the order of a line."""
    text = "".join(part for part, _ in parts)
    files = [file for part, file in parts for _ in part]
    marked = zip(files, directions(text, leftward=leftward), text, strict=True)
    runs = [
        _Run("".join(character for *_, character in group), file, direction)
        for (file, direction), group in itertools.groupby(marked, key=lambda mark: mark[:2])
    ]
    ordered = []
    for direction, neighbours in itertools.groupby(runs, key=lambda run: run.direction):
        # Within what is read leftward, and within a leftward line, the first stands rightmost.
        ordered.append(list(neighbours)[:: -1 if direction == "rtl" else 1])
    return list(itertools.chain.from_iterable(ordered[:: -1 if leftward else 1]))


@functools.cache  # once a process
def _warn_of_glyphs(writing: str, package: str) -> None:
    logger.warning(
        "no font on this machine has %s characters, labels show boxes in their place: "
        "apt-get install %s, or name a font that has them",
        writing,
        package,
    )


@functools.cache
def _warn_of_shapes() -> None:
    logger.warning(
        "letters of labels are neither joined nor read from the right, as their writing wants: "
        "Pillow finds no FriBidi; apt-get install libfribidi0"
    )
