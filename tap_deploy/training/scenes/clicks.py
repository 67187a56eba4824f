"""Where a person clicks in an object, or crosses it out."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_DIRECTIONS = 16  # of a stroke that are tried
_STROKE_POINTS = 8
_STROKE_SHARE = 0.8  # of the way to the edge of an object that a stroke goes


def inner_point(mask: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Return the pixel of a mask that lies deepest inside, as x and y.

    The mask bool [H, W] is worn away from its edges, that of the picture included, until
    nothing more would be left; of what is left, the pixel closest to its centre is taken. It is
    where a person clicks. The mask must not be empty.
    """
    core = mask
    while (smaller := _eroded(core)).any():
        core = smaller
    pixels = np.argwhere(core)  # [n, 2] YX
    distance = np.square(pixels - pixels.mean(axis=0)).sum(axis=1)
    y, x = pixels[distance.argmin()].tolist()
    return float(x), float(y)


def inner_stroke(mask: npt.NDArray[np.bool_]) -> list[tuple[float, float]]:
    """Return a stroke over a mask as pixels x and y, as a person would cross out the object.

    It is straight, runs through ``inner_point`` in the direction in which the mask goes on
    longest, and stops short of both ends. Every pixel of it lies in the mask.

    Args:
        mask: bool [H, W], not empty.
    """
    x, y = inner_point(mask)
    best = (0, 0, 0.0, 0.0)  # length there and back, then the direction
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
    """Return how many steps of a pixel lead from a point to the edge of its mask."""
    height, width = mask.shape
    step = 0
    while True:
        column, row = round(x + (step + 1) * dx), round(y + (step + 1) * dy)
        if not (0 <= column < width and 0 <= row < height and mask[row, column]):
            return step
        step += 1


def _eroded(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Keep the pixels whose eight neighbours are all in the mask."""
    rows = np.pad(mask, 1)
    rows = rows[:-2] & rows[1:-1] & rows[2:]  # [H, W + 2]
    eroded: npt.NDArray[np.bool_] = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    return eroded
