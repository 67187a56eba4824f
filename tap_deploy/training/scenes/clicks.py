"""Strokes that a person would use to select an object."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tap_deploy.evaluation.clicks import inner_point

_DIRECTIONS = 16  # directions of a stroke to try
_STROKE_POINTS = 8
_STROKE_SHARE = 0.8  # length of a stroke as a fraction of the way to the edge


def inner_stroke(mask: npt.NDArray[np.bool_]) -> list[tuple[float, float]]:
    """Return a stroke over a mask as pixels (x, y), as a person would draw it.

    The stroke is straight, runs through ``inner_point`` in the direction in which the mask is
    longest, and ends before the edges. All its pixels lie in the mask.

    Args:
        mask: bool [H, W], not empty.
    """
    x, y = inner_point(mask)
    best = (0, 0, 0.0, 0.0)  # lengths ahead and behind, then the direction
    for direction in range(_DIRECTIONS):
        angle = direction * math.pi / _DIRECTIONS
        dx, dy = math.cos(angle), math.sin(angle)
        ahead, behind = _run(mask, x, y, dx, dy), _run(mask, x, y, -dx, -dy)
        if ahead + behind > best[0] + best[1]:
            best = (ahead, behind, dx, dy)
    ahead, behind, dx, dy = best
    steps = np.linspace(-_STROKE_SHARE * behind, _STROKE_SHARE * ahead, _STROKE_POINTS)
    return [(float(round(x + step * dx)), float(round(y + step * dy))) for step in steps]


def _run(mask: npt.NDArray[np.bool_], x: float, y: float, dx: float, dy: float) -> int:
    """Return the distance from a point to the edge of its mask, in steps of one pixel."""
    height, width = mask.shape
    step = 0
    while True:
        column, row = round(x + (step + 1) * dx), round(y + (step + 1) * dy)
        if not (0 <= column < width and 0 <= row < height and mask[row, column]):
            return step
        step += 1
