"""The run lengths in which Label Studio keeps a brush mask.

A stream of bits, the first bit of a number being its highest:

- 32 bits: how many values follow, 4 per pixel (red, green, blue, alpha), row by row.
- 5 bits: bits of a value, less 1. 4 times 4 bits: bits of the four lengths to choose from, less 1.
- Then runs: 1, two bits for the length chosen, the number of equal values less 1, the value. (A 0
  would start a run of different values, which a mask does not need.)
- Zeros up to a whole byte.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

_VALUE_BITS = 8
_LENGTH_BITS = (3, 4, 8, 16)
_LONGEST = 1 << _LENGTH_BITS[-1]


def brush_rle(mask: npt.NDArray[np.bool_]) -> list[int]:
    """Return the bytes of a mask bool [H, W]; 255 in all four channels where it is True."""
    flat = mask.ravel()
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = 4 * np.diff(ends, prepend=0, append=flat.size)
    header = [_bits(4 * flat.size, 32), _bits(_VALUE_BITS - 1, 5)]
    header += [_bits(size - 1, 4) for size in _LENGTH_BITS]
    first = bool(flat[0])
    runs = (
        run
        for place, length in enumerate(lengths.tolist())
        for run in _runs(length, 255 * (first ^ place % 2))
    )
    text = "".join([*header, *runs])
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def _runs(length: int, value: int) -> Iterator[str]:
    while length:
        part = min(length, _LONGEST)
        choice = next(place for place, size in enumerate(_LENGTH_BITS) if part <= 1 << size)
        part_bits = _bits(part - 1, _LENGTH_BITS[choice])
        yield f"1{_bits(choice, 2)}{part_bits}{_bits(value, _VALUE_BITS)}"
        length -= part


def _bits(number: int, size: int) -> str:
    return f"{number:0{size}b}"
