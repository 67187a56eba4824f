"""Points and strokes that a person would use to select an object."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_DIRECTIONS = 16  # directions of a stroke to try
_STROKE_POINTS = 8
_STROKE_SHARE = 0.8  # length of a stroke as a fraction of the way to the edge


def inner_point(mask: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Return the pixel deepest inside a non-empty mask bool [H, W], as (x, y).

    The mask is eroded, also from the edges of the picture, as long as pixels are left; the result
    is the remaining pixel closest to their centre. It approximates where a person clicks.
    """
    core = mask
    while (smaller := _eroded(core)).any():
        core = smaller
    pixels = np.argwhere(core)  # [n, 2] YX
    distance = np.square(pixels - pixels.mean(axis=0)).sum(axis=1)
    y, x = pixels[distance.argmin()].tolist()
    return float(x), float(y)


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


def _eroded(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the pixels whose eight neighbours are all in the mask."""
    rows = np.pad(mask, 1)
    rows = rows[:-2] & rows[1:-1] & rows[2:]  # [H, W + 2]
    eroded: npt.NDArray[np.bool_] = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    return eroded
