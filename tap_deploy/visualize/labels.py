"""Label plates of an overlay: what they say, and how they break into lines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from tap_deploy.visualize.colors import WHITE, Color

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MAX_LINES = 3  # of a caption
MAX_SHARE = 0.4  # of the picture under labels; beyond it captions go, then labels

_MAX_HEIGHT = 0.35  # of the picture
_PLATE = (16, 18, 24, 208)
_DETAIL = (176, 184, 196)
_CAPTION = (224, 228, 234)
_SMOOTH = 4  # corners are drawn so many times larger, then scaled down


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelStyle:
    """Sizes of a label for one picture, pixels."""

    font: Font
    line_height: int
    padding: int
    stripe: int
    max_width: int
    max_height: int

    @classmethod
    def for_picture(cls, width: int, height: int) -> LabelStyle:
        """Return sizes that stay legible when the picture is shown on a screen as a whole."""
        font_size = max(9, round(6 + 0.0135 * math.sqrt(width * height)))
        font = ImageFont.load_default(font_size)
        _, top, _, bottom = font.getbbox("Ág")
        return cls(
            font=font,
            line_height=math.ceil((bottom - top) * 1.22),
            padding=max(2, round(font_size * 0.4)),
            stripe=max(2, round(font_size * 0.22)),
            max_width=min(width, max(round(0.4 * width), 14 * font_size)),
            max_height=round(_MAX_HEIGHT * height),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelTexts:
    """What there is to say about a region."""

    title: str
    detail: str
    caption: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """A plate: a title, a paler detail beside it, and lines of a caption below."""

    title: str
    detail: str
    lines: tuple[str, ...]
    width: int
    height: int

    @property
    def area(self) -> int:
        """Pixels that the plate covers."""
        return self.width * self.height

    @classmethod
    def fitted(cls, texts: LabelTexts, style: LabelStyle, max_lines: int = MAX_LINES) -> Label:
        """Break and shorten the texts until the plate fits; of the title something remains."""
        font, room = style.font, style.max_width - 2 * style.padding - style.stripe
        title, detail = _shorten(" ".join(texts.title.split()), font, room), texts.detail
        first = font.getlength(title) + style.padding + font.getlength(detail)
        if first > room:
            detail, first = "", font.getlength(title)
        spare = (style.max_height - 2 * style.padding) // style.line_height - 1
        lines = _wrap(texts.caption, font, room, min(max_lines, spare))
        longest = max([first, *map(font.getlength, lines)])
        return cls(
            title=title,
            detail=detail,
            lines=tuple(lines),
            width=math.ceil(longest) + 2 * style.padding + style.stripe,
            height=(1 + len(lines)) * style.line_height + 2 * style.padding,
        )

    def plate(self, color: Color, style: LabelStyle) -> Image.Image:
        """Draw the plate, mode RGBA, with a stripe in the colour of its region."""
        plate = _rounded(self.width, self.height, style.stripe, color)
        draw = ImageDraw.Draw(plate)
        x, y = style.stripe + style.padding, style.padding + style.line_height // 2
        draw.text((x, y), self.title, WHITE, style.font, anchor="lm")
        beside = x + style.font.getlength(self.title) + style.padding
        draw.text((beside, y), self.detail, _DETAIL, style.font, anchor="lm")
        for number, line in enumerate(self.lines, start=1):
            place = (x, y + number * style.line_height)
            draw.text(place, line, _CAPTION, style.font, anchor="lm")
        return plate


def labels_from_texts(
    texts: Sequence[LabelTexts], style: LabelStyle, width: int, height: int
) -> list[Label]:
    """Return a label for each text, with shorter captions the more the picture would be covered."""
    labels: list[Label] = []
    for max_lines in range(MAX_LINES, -1, -1):
        labels = [Label.fitted(text, style, max_lines) for text in texts]
        if sum(label.area for label in labels) <= MAX_SHARE * width * height:
            break
    return labels


def _shorten(text: str, font: Font, room: float) -> str:
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}…") > room:
        text = text[:-1]
    return f"{text.rstrip()}…"


def _wrap(text: str, font: Font, room: float, max_lines: int) -> list[str]:
    if max_lines < 1:
        return []
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= room:
            lines[-1] = joined
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines[max_lines - 1 :] = [" ".join(lines[max_lines - 1 :])]
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
