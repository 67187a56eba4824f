"""Measures of one answer: masks, points to ask with, names in captions."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def mask_iou(found: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]) -> float:
    """Return intersection over union of two masks bool [H, W]; 1.0 if both are empty."""
    union = np.count_nonzero(found | true)
    return np.count_nonzero(found & true) / union if union else 1.0


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


def first_name(caption: str, names: Sequence[str]) -> str | None:
    """Return which of the names stands first in a caption, as whole words, or None.

    Of several that begin at the same word the longest counts: "hot dog" is no "hot".
    Capital letters do not matter.
    """
    found = [
        (match.start(), -len(name), name)
        for name in names
        if (match := re.search(rf"\b{re.escape(name)}\b", caption, re.IGNORECASE))
    ]
    return min(found)[2] if found else None


def _eroded(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Keep the pixels whose eight neighbours are all in the mask."""
    rows = np.pad(mask, 1)
    rows = rows[:-2] & rows[1:-1] & rows[2:]  # [H, W + 2]
    eroded: npt.NDArray[np.bool_] = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    return eroded
