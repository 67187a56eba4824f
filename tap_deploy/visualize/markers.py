"""Prompt markers of an overlay: points as discs, boxes as frames."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image, ImageDraw

from tap_deploy.config import PointLabel
from tap_deploy.prompts import Prompts
from tap_deploy.visualize.colors import SHADOW, WHITE, Box, Color, color_of

_FOREGROUND: Color = (34, 176, 82)
_BACKGROUND: Color = (220, 38, 38)
_SIZE = 3.4  # radius of a point, in line widths
_MANY_SIZE = 2.2
_MANY = 6  # number of points from which _MANY_SIZE applies
_SMOOTH = 8  # antialiasing factor of discs


def draw_boxes(picture: Image.Image, prompts: Prompts, line_width: int) -> None:
    """Draw the box of every prompt that has one."""
    draw = ImageDraw.Draw(picture)
    for index in range(len(prompts)):
        if prompts.labels[index, 0] != PointLabel.BOX_LEFT_TOP:
            continue
        # A box may end at the edge of the picture, one beyond the last pixel.
        corners = np.minimum(prompts.coords[index, :2], (picture.width - 1, picture.height - 1))
        x0, y0, x1, y1 = corners.ravel().tolist()
        box = (x0, y0, x1, y1)
        draw.rectangle(_grown(box), outline=SHADOW, width=line_width + 2)
        draw.rectangle(box, outline=color_of(index), width=line_width)


def draw_points(picture: Image.Image, prompts: Prompts, line_width: int) -> list[Box]:
    """Draw every foreground and background point; return the boxes of the discs, pixels.

    Points of prompts with ``_MANY`` or more points, such as sketches, are drawn smaller.
    """
    boxes: list[Box] = []
    for coords, labels in zip(prompts.coords, prompts.labels, strict=True):
        shown = np.isin(labels, (PointLabel.FOREGROUND, PointLabel.BACKGROUND))
        size = _MANY_SIZE if np.count_nonzero(shown) >= _MANY else _SIZE
        radius = max(2, round(size * line_width))
        for (x, y), label in zip(coords[shown].tolist(), labels[shown].tolist(), strict=True):
            disc = _disc(radius, is_foreground=label == PointLabel.FOREGROUND)
            left, top = round(x) - disc.width // 2, round(y) - disc.height // 2
            picture.paste(disc, (left, top), disc)
            boxes.append((left, top, left + disc.width, top + disc.height))
    return boxes


@functools.lru_cache(maxsize=8)
def _disc(radius: int, *, is_foreground: bool) -> Image.Image:
    color = _FOREGROUND if is_foreground else _BACKGROUND
    side = (2 * radius + 3) * _SMOOTH
    disc = Image.new("RGBA", (side, side), (*SHADOW, 0))
    draw = ImageDraw.Draw(disc)
    middle, unit = side / 2, radius * _SMOOTH
    rings = (
        (unit + _SMOOTH, (*SHADOW, 170)),
        (unit, (*WHITE, 255)),
        (unit * 0.78, (*color, 255)),
    )
    for reach, fill in rings:
        low, high = middle - reach, middle + reach
        draw.ellipse((low, low, high, high), fill)
    arm, half = unit * 0.46, max(unit * 0.11, _SMOOTH / 2)
    draw.rectangle((middle - arm, middle - half, middle + arm, middle + half), WHITE)
    if is_foreground:
        draw.rectangle((middle - half, middle - arm, middle + half, middle + arm), WHITE)
    return disc.resize((side // _SMOOTH,) * 2, Image.Resampling.BOX)


def _grown(box: Box) -> Box:
    return (box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1)
