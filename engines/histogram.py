"""How often each magnitude occurs in a tensor, counted while the values stream by."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

NUM_BINS = 1 << 14
# Counting needs an index per value; longer tensors are taken in pieces of this many values.
CHUNK_VALUES = 1 << 21
SMALLEST_EXPONENT = -100  # below, a range would not survive the division by 127 in float32


class MagnitudeHistogram:
    """Counts of ``|x|`` in bins of equal width over ``[0, 2 ** exponent)``.

    The range is always the smallest power of two that holds the largest magnitude so far. When it
    grows by 2, two bins become one without a rest. So the counts do not depend on the order or
    the batches in which values come, one pass is enough, at least half of the bins are in use at
    any time, and the memory is the same for one sample and for a million.

    Attributes:
        counts: int64 [NUM_BINS], values in ``[i, i + 1) * bin_width``, without zeros.
        zeros: how many values were exactly 0: every threshold keeps those as they are.
        amax: the largest magnitude.
        bad_values: how many were NaN or infinite; they are in no bin.
    """

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(NUM_BINS, np.int64)
        self.exponent = SMALLEST_EXPONENT
        self.amax = 0.0
        self.zeros = 0
        self.bad_values = 0

    @property
    def bin_width(self) -> float:
        """Width of a bin, in units of the tensor."""
        return math.ldexp(1.0, self.exponent) / NUM_BINS

    @property
    def total(self) -> int:
        """Finite values seen, zeros included."""
        return int(self.counts.sum()) + self.zeros

    def add(self, values: npt.NDArray[np.floating[Any]]) -> None:
        """Count the values of a tensor of any shape."""
        flat = values.reshape(-1)
        for start in range(0, flat.size, CHUNK_VALUES):
            self._add_chunk(np.abs(flat[start : start + CHUNK_VALUES], dtype=np.float32))

    def _add_chunk(self, magnitudes: npt.NDArray[np.float32]) -> None:
        largest = float(magnitudes.max())
        if not math.isfinite(largest):
            finite = np.isfinite(magnitudes)
            self.bad_values += int(finite.size - finite.sum())
            magnitudes = magnitudes[finite]
            largest = float(magnitudes.max(initial=0.0))
        self.zeros += magnitudes.size - int(np.count_nonzero(magnitudes))
        if largest == 0.0:
            return
        self._grow(largest)
        # A product with a power of two is exact: every value falls into its own bin.
        positions = np.multiply(magnitudes, np.float32(1.0 / self.bin_width), out=magnitudes)
        counts = np.bincount(positions.astype(np.int32), minlength=NUM_BINS)
        counts[0] -= magnitudes.size - int(np.count_nonzero(magnitudes))
        self.counts += counts

    def _grow(self, largest: float) -> None:
        self.amax = max(self.amax, largest)
        needed = math.frexp(largest)[1]  # largest < 2 ** needed
        if self.counts.any():
            while self.exponent < needed:
                self.counts[: NUM_BINS // 2] = self.counts.reshape(-1, 2).sum(axis=1)
                self.counts[NUM_BINS // 2 :] = 0
                self.exponent += 1
        self.exponent = max(self.exponent, needed)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the whole state, to be kept in a file."""
        numbers = np.array([self.exponent, self.zeros, self.bad_values], np.int64)
        return {"counts": self.counts, "numbers": numbers, "amax": np.array(self.amax)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]]) -> MagnitudeHistogram:
        """Build a histogram from what ``to_arrays`` returned."""
        histogram = cls()
        histogram.counts = np.array(arrays["counts"], np.int64).reshape(NUM_BINS)
        histogram.exponent, histogram.zeros, histogram.bad_values = map(int, arrays["numbers"])
        histogram.amax = float(arrays["amax"])
        return histogram

    def copy_from(self, other: MagnitudeHistogram) -> None:
        """Take over the counts of another one."""
        self.__dict__.update(MagnitudeHistogram.from_arrays(other.to_arrays()).__dict__)
