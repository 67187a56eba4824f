"""Prompts: points, boxes and sketches as coordinates and labels, in pixels of the picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tap_deploy.config import PointLabel
from tap_deploy.errors import InputError
from tap_deploy.prompt_rows import LABELS_TEXT, Row, box_rows, point_rows, sketch_rows

_PADDING_POINT = (0.0, 0.0, float(PointLabel.PADDING))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
    """P prompts, one per region, of N points each.

    The model expects at least one padding point (0, 0, label 4) in a row without box corners, and
    its results depend on N. The ``from_*`` methods add the padding and accept lists, arrays and
    tensors of any dtype and device; the constructor stores the two arrays unchanged.

    Attributes:
        coords: XY in pixels of the original image, float32 [P, N, 2].
        labels: codes of ``PointLabel``, int32 [P, N]. A box is its top-left corner (2) and its
            bottom-right corner (3), the first two points of its row.

    Raises:
        InputError: wrong shape or dtype. ``check`` validates the values.
    """

    coords: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]

    def __post_init__(self) -> None:
        _require_array("coords", self.coords, np.float32, "[P, N, 2]")
        _require_array("labels", self.labels, np.int32, "[P, N]")
        if self.coords.ndim != 3 or self.coords.shape[1] < 1 or self.coords.shape[2] != 2:
            raise InputError(
                f"prompt coords have shape {list(self.coords.shape)}; expected [P, N, 2], N >= 1"
            )
        if self.labels.shape != self.coords.shape[:2]:
            raise InputError(
                f"prompt labels have shape {list(self.labels.shape)}; expected "
                f"{list(self.coords.shape[:2])} like coords"
            )

    def __len__(self) -> int:
        return len(self.coords)

    def __getitem__(self, index: int | slice | Sequence[int]) -> Prompts:
        """Return one region, a slice, or the regions of a list as ``Prompts``, N unchanged."""
        rows = index if isinstance(index, slice) else np.atleast_1d(np.array(index, np.intp))
        return Prompts(coords=self.coords[rows], labels=self.labels[rows])

    @classmethod
    def from_points(cls, points: Any) -> Prompts:
        """Build prompts from points (x, y, label), x and y in pixels of the original image.

        Args:
            points: float [P, N, 3], or a list of P lists of any length, [n, 3] each.

        Raises:
            InputError: wrong shape, or a label that is not an integer.
        """
        return _from_rows(point_rows(points))

    @classmethod
    def from_boxes(cls, boxes: Any) -> Prompts:
        """Build prompts from boxes, float [P, 4] XYXY, pixels of the original image.

        Raises:
            InputError: wrong shape.
        """
        return _from_rows(box_rows(boxes))

    @classmethod
    def from_points_and_boxes(cls, points: Any, boxes: Any) -> Prompts:
        """Build prompts that combine a box with points: region i has ``boxes[i]``, ``points[i]``.

        Args:
            points: as in ``from_points``; a row may be empty.
            boxes: as in ``from_boxes``.

        Raises:
            InputError: wrong shape, or a different number of boxes than rows of points.
        """
        with_points, with_boxes = point_rows(points), box_rows(boxes)
        if len(with_points) != len(with_boxes):
            raise InputError(
                f"{len(with_points)} rows of points and {len(with_boxes)} boxes; expected one box "
                "per row: together they prompt one region; for separate regions use "
                "Prompts.concatenate([Prompts.from_points(…), Prompts.from_boxes(…)])"
            )
        return _from_rows(
            [np.concatenate(pair) for pair in zip(with_boxes, with_points, strict=True)]
        )

    @classmethod
    def from_sketches(cls, strokes: Any) -> Prompts:
        """Build prompts from strokes, one per region.

        Each stroke becomes 9 foreground points and one padding point. The points are evenly
        spaced by arc length, so the speed of the pen does not matter.

        Args:
            strokes: P polylines, float [n, 2] XY, pixels of the original image, n >= 1.

        Raises:
            InputError: wrong shape, an empty stroke, NaN or infinity.
        """
        return _from_rows(sketch_rows(strokes))

    @classmethod
    def concatenate(cls, prompts: Sequence[Prompts]) -> Prompts:
        """Concatenate prompts; rows are padded to the longest one."""
        rows = [
            np.column_stack([coords, labels])
            for part in prompts
            for coords, labels in zip(part.coords, part.labels, strict=True)
        ]
        return _from_rows(rows)

    def check(self, width: int, height: int) -> None:
        """Validate every value for a picture of ``width`` x ``height`` pixels.

        Raises:
            InputError: NaN or infinity, a label outside 0..4, a point outside the picture (except
                padding), a box with a missing or misplaced corner or without area, or a region
                with only padding. The message gives region and point, counted from 0.
        """
        self._check_finite()
        self._check_labels()
        self._check_inside(width, height)
        self._check_boxes()

    def clip(self, width: int, height: int) -> tuple[Prompts, int]:
        """Clip points and box corners to a picture of ``width`` x ``height`` pixels.

        Returns:
            The clipped prompts, and how many of them changed.

        Raises:
            InputError: a box lies outside the picture.
        """
        inside = self.coords.clip(0, (width, height)).astype(np.float32)
        # Padding has no place in the picture; non-finite points are left for ``check`` to report.
        fixed = (self.labels == PointLabel.PADDING) | ~np.isfinite(self.coords).all(axis=2)
        moved = (inside != self.coords).any(axis=2) & ~fixed
        for region in np.flatnonzero(moved.any(axis=1)):
            corners, kept = self.coords[region, :2], inside[region, :2]
            boxed = self.labels[region, 0] == PointLabel.BOX_LEFT_TOP
            if boxed and (corners[0] < corners[1]).all() and not (kept[0] < kept[1]).all():
                raise InputError(
                    f"region {region}: box {corners.ravel().tolist()} lies outside the picture of "
                    f"{width} x {height} pixels; remove it"
                )
        clipped = np.where(moved[..., None], inside, self.coords)
        return Prompts(coords=clipped, labels=self.labels), int(moved.any(axis=1).sum())

    def model_coords(self, scale: float) -> npt.NDArray[np.float32]:
        """Return the coordinates in pixels of the model frame, float32 [P, N, 2] XY."""
        return self.coords * np.float32(scale)

    def _check_finite(self) -> None:
        # Includes padding: the model multiplies it by 0, and 0 * NaN is NaN.
        bad = np.argwhere(~np.isfinite(self.coords).all(axis=2))
        if len(bad):
            raise InputError(f"{self._point(bad[0])} is NaN or infinite; expected finite numbers")

    def _check_labels(self) -> None:
        bad = np.argwhere((self.labels < min(PointLabel)) | (self.labels > max(PointLabel)))
        if len(bad):
            raise InputError(
                f"{self._point(bad[0])} has label {self.labels[tuple(bad[0])]}; expected one of "
                f"{LABELS_TEXT}"
            )
        blank = np.flatnonzero((self.labels == PointLabel.PADDING).all(axis=1))
        if len(blank):
            raise InputError(
                f"region {blank[0]} has only padding points; expected a point or a box"
            )

    def _check_inside(self, width: int, height: int) -> None:
        outside = ((self.coords < 0) | (self.coords > (width, height))).any(axis=2)
        bad = np.argwhere(outside & (self.labels != PointLabel.PADDING))
        if len(bad):
            raise InputError(
                f"{self._point(bad[0])} lies outside the picture; expected x in 0..{width} and "
                f"y in 0..{height}; clip=True (--clip) moves it inside"
            )

    def _check_boxes(self) -> None:
        places = np.arange(self.labels.shape[1])
        left_top = self.labels == PointLabel.BOX_LEFT_TOP
        right_bottom = self.labels == PointLabel.BOX_RIGHT_BOTTOM
        misplaced = (left_top & (places != 0)) | (right_bottom & (places != 1))
        incomplete = left_top.any(axis=1) != right_bottom.any(axis=1)
        bad = np.flatnonzero(misplaced.any(axis=1) | incomplete)
        if len(bad):
            raise InputError(
                f"region {bad[0]} has labels {self.labels[bad[0]].tolist()}; expected a box to be "
                "its first two points, label 2 (top left) then label 3 (bottom right)"
            )
        boxed = np.flatnonzero(left_top[:, 0])
        if len(boxed):
            sides = self.coords[boxed, 1] - self.coords[boxed, 0]
            bad = boxed[(sides <= 0).any(axis=1)]
        if len(bad):
            corners = self.coords[bad[0], :2].ravel().tolist()
            raise InputError(
                f"region {bad[0]}: box {corners} has no area; expected x0 < x1 and y0 < y1"
            )

    def _point(self, place: npt.NDArray[np.intp]) -> str:
        # Print all digits: 600.00006, just outside a picture, must not read as 600.
        x, y = (str(value).removesuffix(".0") for value in self.coords[tuple(place)])
        kinds = {
            PointLabel.BOX_LEFT_TOP: "top-left corner of its box",
            PointLabel.BOX_RIGHT_BOTTOM: "bottom-right corner of its box",
        }
        kind = kinds.get(self.labels[tuple(place)], f"point {place[1]}")
        return f"region {place[0]}, {kind} ({x}, {y})"


def _from_rows(rows: list[Row]) -> Prompts:
    """Pad rows [n, 3] to one length; a row without box corners gets at least one padding point."""
    lengths = [len(row) + int(_needs_padding(row)) for row in rows]
    points = np.empty((len(rows), max(lengths, default=2), 3))
    points[:] = _PADDING_POINT
    for row, padded in zip(rows, points, strict=True):
        padded[: len(row)] = row
    with np.errstate(over="ignore"):  # overflow becomes infinity, which check() reports
        coords = points[..., :2].astype(np.float32)
    return Prompts(coords=coords, labels=points[..., 2].astype(np.int32))


def _needs_padding(row: Row) -> bool:
    return not (row[:, 2] >= PointLabel.BOX_LEFT_TOP).any()


def _require_array(name: str, array: Any, dtype: type[np.generic], shape: str) -> None:
    kind = getattr(array, "dtype", None)
    if not isinstance(array, np.ndarray) or kind != dtype:
        raise InputError(
            f"prompt {name} are of type {kind or type(array).__name__}; expected an array "
            f"{np.dtype(dtype)} {shape}"
        )
