"""How often each magnitude occurs in a tensor, counted while the values stream by."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

MANTISSA_BITS = 10  # 1024 bins an octave: 8 or more for each step of int8 at any threshold
OCTAVES = 24
NUM_BINS = OCTAVES << MANTISSA_BITS
# Counting needs an index per value; longer tensors are taken in pieces of this many values.
CHUNK_VALUES = 1 << 21
_SHIFT = 23 - MANTISSA_BITS  # of the 23 bits of a float32 mantissa


class MagnitudeHistogram:
    """Counts of ``|x|``, in bins as wide as 1/1024 to 1/2048 of the magnitude.

    The leading bits of a float32 are the number of its bin, so counting takes no arithmetic and
    every value falls into its own bin. The 24 octaves below the largest magnitude so far are kept.
    When it grows, the window moves up, and what falls out at its lower end joins the zeros. So the
    counts do not depend on the order or the batches in which values come, one pass is enough, and
    the memory is the same for one sample and for a million. A few huge values, which
    transformers do have, cost no resolution among the others: equal bins would lump them together.

    Attributes:
        counts: int64 [NUM_BINS], values between two ``edges``.
        zeros: how many were 0, or so small (below amax / 2 ** 23) that int8 makes them 0.
        amax: the largest magnitude.
        bad_values: how many were NaN or infinite; they are in no bin.
    """

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(NUM_BINS, np.int64)
        self.top = OCTAVES - 1  # exponent bits of the last octave
        self.amax = 0.0
        self.zeros = 0
        self.bad_values = 0

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """Lower edges of the bins and the upper edge of the last, [NUM_BINS + 1]."""
        bits = np.arange(self._first_bin, self._first_bin + NUM_BINS + 1, dtype=np.uint32)
        return (bits << np.uint32(_SHIFT)).view(np.float32).astype(np.float64)

    @property
    def total(self) -> int:
        """Finite values seen, zeros included."""
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
        # One bin in front of the others takes what is below all of them.
        bins = (magnitudes.view(np.int32) >> _SHIFT) - (self._first_bin - 1)
        counts = np.bincount(np.maximum(bins, 0, out=bins), minlength=NUM_BINS + 1)
        if self._first_bin == 0:  # then zero itself has a bin
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
        """Return the whole state, to be kept in a file."""
        numbers = np.array([self.top, self.zeros, self.bad_values], np.int64)
        return {"counts": self.counts, "numbers": numbers, "amax": np.array(self.amax)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]]) -> MagnitudeHistogram:
        """Build a histogram from what ``to_arrays`` returned."""
        histogram = cls()
        histogram.counts = np.array(arrays["counts"], np.int64).reshape(NUM_BINS)
        histogram.top, histogram.zeros, histogram.bad_values = map(int, arrays["numbers"])
        histogram.amax = float(arrays["amax"])
        return histogram

    def copy_from(self, other: MagnitudeHistogram) -> None:
        """Take over the counts of another one."""
        self.__dict__.update(MagnitudeHistogram.from_arrays(other.to_arrays()).__dict__)
