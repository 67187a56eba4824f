"""Layout of an overlay: where its labels go."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tap_deploy.visualize.colors import Box
from tap_deploy.visualize.labels import MAX_SHARE, Label

_MAX_HIDDEN = 0.05  # of a plate: one that would hide more of others is left out
_GRID = 24  # places tried along each side of the picture


class LabelLayout:
    """Finds places for labels: near their regions, inside the picture, off each other.

    Args:
        width: of the picture, pixels.
        height: of the picture, pixels.
        inset: distance to keep from the edges of the picture, pixels.
        covered: bool, the picture in any resolution, where masks are.
        keep: boxes of drawn points and small regions, which labels should leave visible.
    """

    def __init__(
        self,
        width: int,
        height: int,
        *,
        inset: int,
        covered: npt.NDArray[np.bool_],
        keep: Sequence[Box],
    ) -> None:
        self._width, self._height, self._inset = width, height, inset
        # Summed area table: the covered part of any rectangle is four look-ups.
        self._sums = np.pad(covered.astype(np.float64).cumsum(axis=0).cumsum(axis=1), ((1, 0),) * 2)
        self._keep = np.array(keep, np.float64).reshape(-1, 4)
        self._taken = np.empty((0, 4))

    def place(self, label: Label, region: Box, gap: float) -> tuple[int, int] | None:
        """Return the left top corner of a label for a region, and take that place.

        Returns None if there is no room: the picture is smaller than the label, other labels are
        in the way, or cover enough of it already.
        """
        if label.width > self._width or label.height > self._height:
            return None
        share = (_areas(self._taken).sum() + label.area) / (self._width * self._height)
        if len(self._taken) and share > MAX_SHARE:
            return None
        spots = self._spots(label, region, gap)
        plates = np.concatenate([spots, spots + np.array([label.width, label.height])], axis=1)
        hidden = _overlap(plates, self._taken).sum(axis=1) / label.area
        kept = (_overlap(plates, self._keep) / _areas(self._keep).clip(1)).sum(axis=1)
        distance = (_distance(plates, region) - gap).clip(0)
        distance /= math.hypot(self._width, self._height)
        cost = 20 * hidden + 0.7 * kept + 0.6 * self._covered(plates) + 4 * distance
        best = int(cost.argmin())  # of equals the first: spots come in order of preference
        if hidden[best] > _MAX_HIDDEN:
            return None
        self._taken = np.concatenate([self._taken, plates[best : best + 1]])
        return int(spots[best, 0]), int(spots[best, 1])

    def _spots(self, label: Label, region: Box, gap: float) -> npt.NDArray[np.float64]:
        """Left top corners to try, float [n, 2]: beside the region, then all over the picture."""
        x0, y0, x1, y1 = region
        w, h = label.width, label.height
        center_x, center_y = (x0 + x1 - w) / 2, (y0 + y1 - h) / 2
        above, below, left, right = y0 - h - gap, y1 + gap, x0 - w - gap, x1 + gap
        near = [(x0, above), (center_x, above), (x1 - w, above)]
        near += [(x0, below), (center_x, below), (x1 - w, below)]
        near += [(right, y0), (right, center_y), (left, y0), (left, center_y)]
        near += [(x0 + gap, y0 + gap), (x0 + gap, y1 - h - gap), (center_x, center_y)]
        low = np.minimum([self._inset] * 2, [self._width - w, self._height - h])
        high = np.maximum([self._width - w, self._height - h] - low, low)
        xs, ys = np.linspace(low, high, _GRID).T
        grid = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
        spots = np.concatenate([np.array(near, np.float64), grid])
        inside: npt.NDArray[np.float64] = np.floor(spots.clip(low, high))
        return inside

    def _covered(self, plates: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return how much of each plate lies on masks, 0..1."""
        rows, columns = self._sums.shape[0] - 1, self._sums.shape[1] - 1
        scale = np.array([columns / self._width, rows / self._height] * 2)
        x0, y0, x1, y1 = np.rint(plates * scale).astype(np.intp).T
        x0, y0 = np.minimum(x0, columns - 1), np.minimum(y0, rows - 1)
        x1, y1 = x1.clip(x0 + 1, columns), y1.clip(y0 + 1, rows)
        sums = self._sums
        inside = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
        part: npt.NDArray[np.float64] = inside / ((x1 - x0) * (y1 - y0))
        return part


def _overlap(
    plates: npt.NDArray[np.float64], others: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the area that each of plates [n, 4] shares with boxes [m, 4], float [n, m]."""
    low = np.maximum(plates[:, None, :2], others[None, :, :2])
    high = np.minimum(plates[:, None, 2:], others[None, :, 2:])
    shared: npt.NDArray[np.float64] = (high - low).clip(0).prod(axis=2)
    return shared


def _areas(boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    sides = boxes[:, 2:] - boxes[:, :2]
    areas: npt.NDArray[np.float64] = sides.prod(axis=1)
    return areas


def _distance(plates: npt.NDArray[np.float64], region: Box) -> npt.NDArray[np.float64]:
    """Return the gap between each of plates [n, 4] and a region, pixels; 0 if they touch."""
    box = np.array(region)
    gaps = np.maximum(plates[:, :2] - box[2:], box[:2] - plates[:, 2:]).clip(0)
    distance: npt.NDArray[np.float64] = np.hypot(gaps[:, 0], gaps[:, 1])
    return distance
