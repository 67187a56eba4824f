"""Parsing of callers' points, boxes and strokes into one row of points (x, y, label) a region."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tap_deploy.config import PointLabel
from tap_deploy.errors import InputError

Row = npt.NDArray[np.float64]  # [n, 3] x, y, label

SKETCH_POINTS = 9  # as in training
LABELS_TEXT = ", ".join(f"{int(label)} {label.name.lower()}" for label in PointLabel)

_LABEL_LIMIT = 2.0**31  # labels are kept as int32


def point_rows(points: Any) -> list[Row]:
    """Return the points of each region; a region may have none.

    Raises:
        InputError: not P lists of [n, 3], or a label that is not an integer.
    """
    rows = [
        _numbers(row, 3, f"points of region {region}", "[n, 3]: (x, y, label) each")
        for region, row in enumerate(_regions(points, "points"))
    ]
    for region, row in enumerate(rows):
        whole = np.abs(row[:, 2]) < _LABEL_LIMIT
        whole[whole] = row[whole, 2] % 1 == 0
        if not whole.all():
            place = int(np.argmin(whole))
            raise InputError(
                f"region {region}, point {place} has label {row[place, 2]!s}; expected one of "
                f"{LABELS_TEXT}"
            )
    return rows


def box_rows(boxes: Any) -> list[Row]:
    """Return the two labelled corners of each box of [P, 4] XYXY.

    Raises:
        InputError: wrong shape.
    """
    corners = _numbers(boxes, 4, "boxes", "[P, 4]: (x0, y0, x1, y1) each")
    labels = np.array([PointLabel.BOX_LEFT_TOP, PointLabel.BOX_RIGHT_BOTTOM], np.float64)
    return [np.column_stack([row.reshape(2, 2), labels]) for row in corners]


def sketch_rows(strokes: Any) -> list[Row]:
    """Sample 9 foreground points along each stroke [n, 2], evenly spaced by arc length.

    Raises:
        InputError: wrong shape, an empty stroke, NaN or infinity.
    """
    return [
        _sketch_row(stroke, region) for region, stroke in enumerate(_regions(strokes, "strokes"))
    ]


def _sketch_row(stroke: Any, region: int) -> Row:
    line = _numbers(stroke, 2, f"stroke of region {region}", "[n, 2]: (x, y) each, n >= 1")
    if len(line) == 0 or not np.isfinite(line).all():
        problem = "is empty" if len(line) == 0 else "holds NaN or infinity"
        raise InputError(f"stroke of region {region} {problem}; expected finite points (x, y)")
    row = np.full((SKETCH_POINTS, 3), float(PointLabel.FOREGROUND))
    with np.errstate(over="ignore", invalid="ignore"):  # gives NaN, which Prompts.check reports
        steps = np.hypot(*np.diff(line, axis=0).T)
        length = np.concatenate([[0.0], np.cumsum(steps)])  # [n], pixels from the first point
        picks = np.linspace(0.0, length[-1], SKETCH_POINTS)
        row[:, 0] = np.interp(picks, length, line[:, 0])
        row[:, 1] = np.interp(picks, length, line[:, 1])
    return row


def _regions(values: Any, name: str) -> list[Any]:
    expected = "a list or array with one entry per region"
    plain = values
    if not isinstance(values, list | tuple):
        try:
            plain = np.asarray(_plain(values))
        except Exception as exc:  # arrays of other libraries may raise anything
            raise InputError(_unreadable(values, name, expected)) from exc
    if isinstance(plain, np.ndarray) and plain.ndim == 0:
        raise InputError(_unreadable(values, name, expected))
    return list(plain)


def _numbers(values: Any, columns: int, name: str, expected: str) -> Row:
    try:
        rows = np.asarray(_plain(values), np.float64)
    except Exception as exc:  # arrays of other libraries may raise anything
        raise InputError(_unreadable(values, name, expected)) from exc
    if rows.ndim and len(rows) == 0:
        return rows.reshape(0, columns)
    if rows.ndim != 2 or rows.shape[1] != columns:
        raise InputError(f"{name}: shape is {list(rows.shape)}; expected {expected}")
    return rows


def _plain(values: Any) -> Any:
    """Return values that NumPy can read: tensors of any dtype and device become lists."""
    if isinstance(values, list | tuple):
        return [_plain(value) for value in values]
    # NumPy drops the imaginary part of a complex array, but raises for a complex list.
    is_real = isinstance(values, np.ndarray) and values.dtype.kind != "c"
    return values if is_real or not hasattr(values, "tolist") else values.tolist()


def _unreadable(values: Any, name: str, expected: str) -> str:
    kind = type(values).__name__
    return f"{name}: a {kind} that is not an array of numbers; expected {expected}"
