"""Streaming histogram of the magnitudes of a tensor."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

MANTISSA_BITS = 10  # 1024 bins per octave: at least 8 per int8 step for any threshold
OCTAVES = 24
NUM_BINS = OCTAVES << MANTISSA_BITS
# Counting needs an index per value; longer tensors are counted in chunks of this size.
CHUNK_VALUES = 1 << 21
_SHIFT = 23 - MANTISSA_BITS  # drops the lower bits of float32's 23-bit mantissa


class MagnitudeHistogram:
    """Histogram of ``|x|`` with bins of 1/1024 to 1/2048 of the magnitude.

    The leading bits of a float32 are the index of its bin, so counting needs no arithmetic and is
    exact. The histogram covers the 24 octaves below the largest magnitude so far. When that grows,
    the window moves up, and the counts below it are added to ``zeros``. The counts are therefore
    independent of the order and batches of the values, one pass suffices, and memory is constant.
    The few huge values that transformers have do not reduce the resolution for the others, as they
    would with bins of equal width.

    Attributes:
        counts: number of values in each bin, int64 [NUM_BINS].
        top: biased float32 exponent of the highest octave.
        amax: largest magnitude.
        zeros: number of values that are 0, or below amax / 2 ** 23, which int8 rounds to 0.
        bad_values: number of NaN and infinite values; they are in no bin.
    """

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(NUM_BINS, np.int64)
        self.top = OCTAVES - 1
        self.amax = 0.0
        self.zeros = 0
        self.bad_values = 0

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """Bin edges, float64 [NUM_BINS + 1]."""
        bits = np.arange(self._first_bin, self._first_bin + NUM_BINS + 1, dtype=np.uint32)
        return (bits << np.uint32(_SHIFT)).view(np.float32).astype(np.float64)

    @property
    def total(self) -> int:
        """Number of finite values, including zeros."""
        return int(self.counts.sum()) + self.zeros

    @property
    def _first_bin(self) -> int:
        return (self.top - OCTAVES + 1) << MANTISSA_BITS

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
        self._move_up(largest)
        # An extra bin 0 counts the values below the window.
        bins = (magnitudes.view(np.int32) >> _SHIFT) - (self._first_bin - 1)
        counts = np.bincount(np.maximum(bins, 0, out=bins), minlength=NUM_BINS + 1)
        if self._first_bin == 0:  # zero shares bin 1 with subnormal numbers
            zeros = magnitudes.size - int(np.count_nonzero(magnitudes))
            counts[0], counts[1] = zeros, counts[1] - zeros
        self.zeros += int(counts[0])
        self.counts += counts[1:]

    def _move_up(self, largest: float) -> None:
        self.amax = max(self.amax, largest)
        octaves = int(np.float32(largest).view(np.int32) >> 23) - self.top
        if octaves <= 0:
            return
        dropped = min(octaves << MANTISSA_BITS, NUM_BINS)
        self.zeros += int(self.counts[:dropped].sum())
        self.counts = np.concatenate([self.counts[dropped:], np.zeros(dropped, np.int64)])
        self.top += octaves

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the state as arrays, for a file."""
        numbers = np.array([self.top, self.zeros, self.bad_values], np.int64)
        return {"counts": self.counts, "numbers": numbers, "amax": np.array(self.amax)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]]) -> MagnitudeHistogram:
        """Build a histogram from the output of ``to_arrays``."""
        histogram = cls()
        histogram.counts = np.array(arrays["counts"], np.int64).reshape(NUM_BINS)
        histogram.top, histogram.zeros, histogram.bad_values = map(int, arrays["numbers"])
        histogram.amax = float(arrays["amax"])
        return histogram

    def copy_from(self, other: MagnitudeHistogram) -> None:
        """Copy the state of another histogram."""
        self.__dict__.update(MagnitudeHistogram.from_arrays(other.to_arrays()).__dict__)
