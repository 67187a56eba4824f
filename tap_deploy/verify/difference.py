"""Difference between two tensors of any size, in little memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from tap_deploy.verify.tolerances import Tolerance

CHUNK_VALUES = 1 << 17  # compared at once: stays in the cache, and needs no copy of a tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a tensor is from its expected value.

    Attributes:
        max_abs: largest absolute difference; infinite where only one of two values is finite.
        max_rel: ``max_abs`` over the largest expected magnitude.
        mean_abs: mean absolute difference.
        mean_rel: ``mean_abs`` over the mean expected magnitude.
    """

    max_abs: float
    max_rel: float
    mean_abs: float
    mean_rel: float

    def fits(self, tolerance: Tolerance) -> bool:
        """Whether the difference is within a tolerance."""
        largest = self.max_rel if tolerance.relative else self.max_abs
        return largest <= tolerance.max and (
            tolerance.mean is None or self.mean_rel <= tolerance.mean
        )


INFINITE = Difference(max_abs=math.inf, max_rel=math.inf, mean_abs=math.inf, mean_rel=math.inf)


def difference(actual: np.ndarray, expected: np.ndarray) -> Difference:
    """Compare two tensors of the same shape, of floats, integers or booleans.

    Equal infinities and NaN in the same places are no difference: graphs mask attention scores with
    infinity.
    """
    largest = total = magnitude = magnitudes = 0.0
    dtype = np.result_type(actual, expected, np.float32)
    for start in range(0, actual.size, CHUNK_VALUES):
        x, y = (
            array.reshape(-1)[start : start + CHUNK_VALUES].astype(dtype, copy=False)
            for array in (actual, expected)
        )
        with np.errstate(invalid="ignore", over="ignore"):
            distances = np.abs(x - y)
        if not np.isfinite(distances.max()):
            finite = np.isfinite(x) & np.isfinite(y)
            if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
                return INFINITE
            x, y = x[finite].astype(np.float64), y[finite].astype(np.float64)
            distances = np.abs(x - y)
        values = np.abs(y)
        largest = max(largest, float(distances.max(initial=0.0)))
        magnitude = max(magnitude, float(values.max(initial=0.0)))
        total += float(distances.sum(dtype=np.float64))
        magnitudes += float(values.sum(dtype=np.float64))
    return Difference(
        max_abs=largest,
        max_rel=_share(largest, magnitude),
        mean_abs=total / actual.size if actual.size else 0.0,
        mean_rel=_share(total, magnitudes),
    )


def _share(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole else math.inf


def chunks(actual: np.ndarray, expected: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield parts of two tensors of the same shape, flat and in float64."""
    for start in range(0, actual.size, CHUNK_VALUES):
        part = slice(start, start + CHUNK_VALUES)
        a, b = (array.reshape(-1)[part].astype(np.float64) for array in (actual, expected))
        yield a, b
