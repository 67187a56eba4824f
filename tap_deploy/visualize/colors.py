"""Colours of an overlay, RGB 0..255, and shared types."""

from __future__ import annotations

import colorsys

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels

WHITE: Color = (255, 255, 255)
SHADOW: Color = (12, 14, 20)

# Bright enough on any photograph; neighbouring entries differ in hue and in lightness.
PALETTE: tuple[Color, ...] = (
    (64, 156, 255),
    (255, 149, 0),
    (52, 211, 153),
    (236, 72, 153),
    (250, 204, 21),
    (167, 139, 250),
    (34, 211, 238),
    (239, 68, 68),
    (163, 230, 53),
    (217, 70, 239),
)

_GOLDEN_RATIO = 0.618034


def color_of(index: int) -> Color:
    """Return the RGB colour of a region, 0..255."""
    if index < len(PALETTE):
        return PALETTE[index]
    turns = index - len(PALETTE)
    red, green, blue = colorsys.hsv_to_rgb(
        turns * _GOLDEN_RATIO % 1, (0.85, 0.6)[turns % 2], (0.95, 0.8)[turns // 2 % 2]
    )
    return round(red * 255), round(green * 255), round(blue * 255)
