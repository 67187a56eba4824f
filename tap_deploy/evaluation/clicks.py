"""Points that a person would click: the first in the object, the next where the mask is wrong."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tap_deploy.config import PointLabel
from tap_deploy.masks import box_from_mask

Click = tuple[float, float, int]  # x, y in pixels, and a ``PointLabel``


def inner_point(mask: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Return the pixel deepest inside a non-empty mask bool [H, W], as (x, y).

    The mask is eroded, also from the edges of the picture, as long as pixels are left; the result
    is the remaining pixel closest to their centre. It approximates where a person clicks.
    """
    left, top, width, height = box_from_mask(mask)
    core = mask[top : top + height, left : left + width]
    while (smaller := _eroded(core)).any():
        core = smaller
    pixels = np.argwhere(core)  # [n, 2] YX
    distance = np.square(pixels - pixels.mean(axis=0)).sum(axis=1)
    y, x = pixels[distance.argmin()].tolist()
    return float(left + x), float(top + y)


def first_click(truth: npt.NDArray[np.bool_]) -> Click:
    """Return a foreground point deep inside a non-empty mask bool [H, W]."""
    return (*inner_point(truth), int(PointLabel.FOREGROUND))


def next_click(found: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> Click | None:
    """Return the point that corrects a mask, or None if it is right.

    The point lies deep in what is missing (foreground) or in what is too much (background),
    whichever has more pixels.

    Args:
        found: the predicted mask, bool [H, W].
        truth: the true mask, bool [H, W].
    """
    missing, surplus = truth & ~found, found & ~truth
    is_missing = np.count_nonzero(missing) >= np.count_nonzero(surplus)
    wrong = missing if is_missing else surplus
    if not wrong.any():
        return None
    label = PointLabel.FOREGROUND if is_missing else PointLabel.BACKGROUND
    return (*inner_point(wrong), int(label))


def _eroded(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the pixels whose eight neighbours are all in the mask."""
    rows = np.pad(mask, 1)
    rows = rows[:-2] & rows[1:-1] & rows[2:]  # [H, W + 2]
    eroded: npt.NDArray[np.bool_] = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    return eroded
