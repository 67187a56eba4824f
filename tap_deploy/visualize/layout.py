"""Places the labels of an overlay."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tap_deploy.visualize.colors import Box
from tap_deploy.visualize.labels import MAX_SHARE, Label

_MAX_HIDDEN = 0.05  # share of a plate that may overlap others; above it, the label is left out
_GRID = 24  # candidate positions along each side of the picture


class LabelLayout:
    """Places labels near their regions, inside the picture, without overlaps.

    Args:
        width: width of the picture, pixels.
        height: height of the picture, pixels.
        inset: distance to keep from the edges of the picture, pixels.
        covered: union of the masks in any resolution, bool [h, w].
        keep: boxes of drawn points and small regions, which labels avoid.
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
        # Summed-area table: the covered part of any rectangle takes four look-ups.
        self._sums = np.pad(covered.astype(np.float64).cumsum(axis=0).cumsum(axis=1), ((1, 0),) * 2)
        self._keep = np.array(keep, np.float64).reshape(-1, 4)
        self._taken = np.empty((0, 4))

    def place(self, label: Label, region: Box, gap: float) -> tuple[int, int] | None:
        """Return the top left corner of a label for a region, and reserve that place.

        Return None if there is no room: the label is larger than the picture, every place overlaps
        other labels, or labels would cover more than ``MAX_SHARE`` of the picture.
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
        best = int(cost.argmin())  # the first minimum: spots are in order of preference
        if hidden[best] > _MAX_HIDDEN:
            return None
        self._taken = np.concatenate([self._taken, plates[best : best + 1]])
        return int(spots[best, 0]), int(spots[best, 1])

    def _spots(self, label: Label, region: Box, gap: float) -> npt.NDArray[np.float64]:
        """Return candidate top left corners, float [n, 2]: near the region, then on a grid."""
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
        """Return the share of each plate [n, 4] that lies on masks, float [n] in 0..1."""
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
    """Return the overlap area of plates [n, 4] with boxes [m, 4], float [n, m]."""
    low = np.maximum(plates[:, None, :2], others[None, :, :2])
    high = np.minimum(plates[:, None, 2:], others[None, :, 2:])
    shared: npt.NDArray[np.float64] = (high - low).clip(0).prod(axis=2)
    return shared


def _areas(boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    sides = boxes[:, 2:] - boxes[:, :2]
    areas: npt.NDArray[np.float64] = sides.prod(axis=1)
    return areas


def _distance(plates: npt.NDArray[np.float64], region: Box) -> npt.NDArray[np.float64]:
    """Return the distance of each plate [n, 4] from a region, pixels [n]; 0 if they touch."""
    box = np.array(region)
    gaps = np.maximum(plates[:, :2] - box[2:], box[:2] - plates[:, 2:]).clip(0)
    distance: npt.NDArray[np.float64] = np.hypot(gaps[:, 0], gaps[:, 1])
    return distance
