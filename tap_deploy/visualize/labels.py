"""Label plates of an overlay: their texts, sizes and line breaks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from tap_deploy.visualize.colors import WHITE, Color
from tap_deploy.visualize.fonts import FontFile
from tap_deploy.visualize.typeface import Typeface
from tap_deploy.visualize.writing import cleaned, clusters, is_leftward, pieces

MAX_LINES = 3  # lines of a caption
MAX_SHARE = 0.4  # share of the picture under labels; above it, drop captions, then labels

_MAX_HEIGHT = 0.35  # height of a plate as a share of the picture
_PLATE = (16, 18, 24, 208)
_DETAIL = (176, 184, 196)
_CAPTION = (224, 228, 234)
_SMOOTH = 4  # antialiasing factor of corners


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelStyle:
    """Font and sizes of the labels of one picture.

    Attributes:
        font: the typeface.
        padding: distance between text and plate edge, pixels.
        stripe: width of the coloured stripe, pixels.
        max_width: maximum width of a plate, pixels.
        max_height: maximum height of a plate, pixels.
    """

    font: Typeface
    padding: int
    stripe: int
    max_width: int
    max_height: int

    @classmethod
    def for_picture(cls, width: int, height: int, font: FontFile | None = None) -> LabelStyle:
        """Return sizes that are legible when the whole picture is shown on a screen."""
        font_size = max(9, round(6 + 0.0135 * math.sqrt(width * height)))
        return cls(
            font=Typeface(font_size, font),
            padding=max(2, round(font_size * 0.4)),
            stripe=max(2, round(font_size * 0.22)),
            max_width=min(width, max(round(0.4 * width), 14 * font_size)),
            max_height=round(_MAX_HEIGHT * height),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelTexts:
    """Texts of a label.

    Attributes:
        title: the likeliest concept.
        detail: its probability.
        caption: the caption of the region.
    """

    title: str
    detail: str
    caption: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """A plate with a title, a paler detail next to it, and the caption below.

    Attributes:
        title: text of the first line.
        detail: text after the title.
        lines: lines of the caption.
        width: width of the plate, pixels.
        height: height of the plate, pixels.
    """

    title: str
    detail: str
    lines: tuple[str, ...]
    width: int
    height: int

    @property
    def area(self) -> int:
        """Area of the plate, pixels."""
        return self.width * self.height

    @classmethod
    def fitted(cls, texts: LabelTexts, style: LabelStyle, max_lines: int = MAX_LINES) -> Label:
        """Return a label whose texts are wrapped and shortened to fit; part of the title stays."""
        font, room = style.font, style.max_width - 2 * style.padding - style.stripe
        title, caption, detail = cleaned(texts.title), cleaned(texts.caption), texts.detail
        line_height = font.line_height([title, caption])
        title = _shorten(title, font, room)
        first = font.length(title) + style.padding + font.length(detail)
        if first > room:
            detail, first = "", font.length(title)
        spare = (style.max_height - 2 * style.padding) // line_height - 1
        lines = _wrap(caption, font, room, min(max_lines, spare))
        longest = max([first, *map(font.length, lines)])
        return cls(
            title=title,
            detail=detail,
            lines=tuple(lines),
            width=math.ceil(longest) + 2 * style.padding + style.stripe,
            height=(1 + len(lines)) * line_height + 2 * style.padding,
        )

    def plate(self, color: Color, style: LabelStyle) -> Image.Image:
        """Draw the plate, mode RGBA, with a stripe in the colour of its region."""
        font, plate = style.font, _rounded(self.width, self.height, style.stripe, color)
        draw = ImageDraw.Draw(plate)
        line_height = (self.height - 2 * style.padding) // (1 + len(self.lines))
        x, y = style.stripe + style.padding, style.padding + line_height // 2
        font.draw(draw, (x, y), self.title, WHITE, leftward=is_leftward(self.title))
        beside = x + font.length(self.title) + style.padding
        font.draw(draw, (beside, y), self.detail, _DETAIL)
        leftward = is_leftward(" ".join(self.lines))
        for line in self.lines:
            y += line_height
            left = self.width - style.padding - font.length(line) if leftward else x
            font.draw(draw, (left, y), line, _CAPTION, leftward=leftward)
        return plate


def labels_from_texts(
    texts: Sequence[LabelTexts], style: LabelStyle, width: int, height: int
) -> list[Label]:
    """Return a label for each text; captions get fewer lines if labels exceed ``MAX_SHARE``."""
    labels: list[Label] = []
    for max_lines in range(MAX_LINES, -1, -1):
        labels = [Label.fitted(text, style, max_lines) for text in texts]
        if sum(label.area for label in labels) <= MAX_SHARE * width * height:
            break
    return labels


def _shorten(text: str, font: Typeface, room: float) -> str:
    if font.length(text) <= room:
        return text
    kept = clusters(text)
    while kept and font.length(f"{text}…") > room:
        kept.pop()
        text = "".join(kept).rstrip()
    return f"{text}…"


def _wrap(text: str, font: Typeface, room: float, max_lines: int) -> list[str]:
    if max_lines < 1:
        return []
    lines: list[str] = []
    for piece in pieces(text):
        full = len(lines) == max_lines  # the last line takes the rest and is shortened
        if full and font.length(lines[-1]) > room:
            break
        if lines and (full or font.length(lines[-1] + piece) <= room):
            lines[-1] += piece
        else:
            lines.append(piece.lstrip())
    return [_shorten(line, font, room) for line in lines]


def _rounded(width: int, height: int, stripe: int, color: Color) -> Image.Image:
    large = (width * _SMOOTH, height * _SMOOTH)
    shape = Image.new("L", large)
    radius = stripe * _SMOOTH
    ImageDraw.Draw(shape).rounded_rectangle((0, 0, large[0] - 1, large[1] - 1), radius, 255)
    shape = shape.resize((width, height), Image.Resampling.BOX)
    plate = Image.new("RGBA", (width, height), _PLATE)
    plate.paste((*color, 255), (0, 0, stripe, height))
    alpha = Image.composite(plate.getchannel("A"), Image.new("L", plate.size), shape)
    plate.putalpha(alpha)
    return plate
