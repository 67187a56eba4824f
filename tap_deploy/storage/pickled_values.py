"""Builds the values that a pickle may contain: NumPy arrays, scalars and dtypes.

``unpickle`` reads the instructions. This module defines the global names that they may use and
the only calls that they may cause; arguments are checked before anything is built.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from collections import OrderedDict
from typing import Any

import numpy as np

MAX_DIMENSIONS = 32
MAX_SIDE = 2**48  # side of an array; keeps the product of the sides cheap to compute
# Python hashes integers modulo 2**61 - 1. Smaller integers have distinct hashes (except -1 and -2);
# larger ones can be chosen to collide, which makes building a dict take quadratic time.
MAX_KEY = 2**60

_NUMBER_OR_TEXT = re.compile(r"(b1|[iu][1248]|f[248]|c8|c16|[SU][1-9]\d{0,5})\Z")
# Hashing these types never runs foreign code or recurses.
_KEY_TYPES = (str, bytes, int, float, bool, type(None))


class Refused(Exception):
    """A pickle asks for something that is not allowed; the message names it."""


class Symbol(enum.Enum):
    """Meaning of a global name in a pickle."""

    RECONSTRUCT = enum.auto()
    FROM_BUFFER = enum.auto()
    SCALAR = enum.auto()
    NDARRAY = enum.auto()
    EMPTY_ARRAY = enum.auto()  # not a name: the only arguments that RECONSTRUCT takes
    DTYPE = enum.auto()
    ENCODE = enum.auto()
    BYTES = enum.auto()
    SET = enum.auto()
    ORDERED_DICT = enum.auto()


_SYMBOLS = {
    # NumPy 2 renamed numpy.core; files exist from both versions.
    "numpy.core.multiarray _reconstruct": Symbol.RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": Symbol.RECONSTRUCT,
    "numpy.core.numeric _frombuffer": Symbol.FROM_BUFFER,
    "numpy._core.numeric _frombuffer": Symbol.FROM_BUFFER,
    "numpy.core.multiarray scalar": Symbol.SCALAR,
    "numpy._core.multiarray scalar": Symbol.SCALAR,
    "numpy ndarray": Symbol.NDARRAY,
    "numpy dtype": Symbol.DTYPE,
    # Protocols 0 to 2 have no opcode for bytes, and 0 to 3 none for sets.
    "_codecs encode": Symbol.ENCODE,
    "__builtin__ bytes": Symbol.BYTES,
    "__builtin__ set": Symbol.SET,
    "builtins set": Symbol.SET,
    "collections OrderedDict": Symbol.ORDERED_DICT,
}


@dataclasses.dataclass
class Unbuilt:
    """A dtype or an array between its REDUCE and its BUILD instruction.

    Attributes:
        code: dtype code; None for an array.
        value: the result of BUILD; None before.
    """

    code: str | None
    value: Any = None


def symbol_from_name(module_and_name: str) -> Symbol:
    """Return the symbol of a global, given as module and name separated by a space."""
    if module_and_name not in _SYMBOLS:
        raise Refused(module_and_name.replace(" ", ".", 1))
    return _SYMBOLS[module_and_name]


def check_value(value: Any) -> Any:
    """Return a value if it may be part of the result; reject constructors and unbuilt values."""
    if isinstance(value, Symbol | Unbuilt):
        raise Refused("a constructor in place of a value")
    return value


def check_key(key: Any) -> Any:
    """Return a value if it may be a dict key or a member of a set."""
    if type(key) not in _KEY_TYPES:
        raise Refused(f"a key of type {type(check_value(key)).__name__}")
    if type(key) is int and abs(key) >= MAX_KEY:
        raise Refused("a key that is an integer of 61 bits or more")
    return key


class Constructors:
    """The calls that a pickle of ``size_bytes`` may cause.

    Methods raise ``Refused`` for arguments that no pickle writer produces, and ``ValueError`` for
    inconsistent data.
    """

    def __init__(self, size_bytes: int) -> None:
        # A genuine pickle stores every array, and every item of a set, once. In protocol 2 an array
        # is counted twice, as text and as array. More copies mean a decompression bomb.
        self._bytes_left = 2 * size_bytes

    def call(self, symbol: Symbol, arguments: Any) -> Any:
        """Return the result of a REDUCE instruction."""
        match symbol, arguments:
            case Symbol.RECONSTRUCT, Symbol.EMPTY_ARRAY:
                return Unbuilt(None)
            case Symbol.DTYPE, (str(code), bool() | 0 | 1, bool() | 0 | 1):
                if _NUMBER_OR_TEXT.match(code):
                    return Unbuilt(code)
                raise Refused(f"NumPy dtype {code}")
            case Symbol.FROM_BUFFER, (
                bytes() | bytearray() as raw,
                np.dtype() as dtype,
                tuple(shape),
                "C" | "F" as order,
            ):
                return self._array(shape, dtype, order == "F", raw)
            case Symbol.FROM_BUFFER, (raw, dtype, shape, "K", tuple(axes)):
                if len(axes) > MAX_DIMENSIONS or not all(type(axis) is int for axis in axes):
                    raise ValueError("an array of an impossible axis order")
                return self.call(symbol, (raw, dtype, shape, "C")).transpose(axes)
            case Symbol.SCALAR, (np.dtype() as dtype, bytes() | str() as raw):
                return self._array((), dtype, False, raw)[()]
            case Symbol.ENCODE, (str(text), "latin1" | "latin-1"):
                self._spend(len(text))
                return text.encode("latin-1")
            case Symbol.SET, (list(items),):
                self._spend(len(items))  # in a file an item takes a byte or more
                return {check_key(item) for item in items}
            case Symbol.BYTES, ():
                return b""
            case Symbol.ORDERED_DICT, ():
                return OrderedDict()
        raise Refused(f"a call of {symbol.name} with unusual arguments")

    def build(self, target: Any, state: Any) -> Any:
        """Return the replacement of ``target`` after a BUILD instruction."""
        match target, state:
            case Unbuilt(code=None, value=None), (
                1,
                tuple(shape),
                np.dtype() as dtype,
                bool() | 0 | 1 as is_fortran,
                bytes() | str() as raw,
            ):
                target.value = self._array(shape, dtype, bool(is_fortran), raw)
                return target.value
            case Unbuilt(code=str(code), value=None), (
                int(),
                "<" | ">" | "=" | "|" as byte_order,
                None,
                None,
                None,
                *_,
            ):
                target.value = np.dtype(byte_order + code)
                return target.value
            case OrderedDict(), dict():
                return target  # torch stores version numbers in the state, which is ignored
        kind = "an array or dtype" if isinstance(target, Unbuilt) else type(target).__name__
        raise Refused(f"an unusual state for {kind}")

    def _spend(self, num_bytes: int) -> None:
        self._bytes_left -= num_bytes
        if self._bytes_left < 0:
            raise ValueError("it expands to more than its own size")

    def _array(
        self,
        shape: tuple[Any, ...],
        dtype: np.dtype[Any],
        is_fortran: bool,
        raw: bytes | bytearray | str,
    ) -> np.ndarray[Any, Any]:
        if isinstance(raw, str):  # bytes pickled by Python 2
            raw = raw.encode("latin-1")
        self._spend(len(raw))
        # Check the length first: a long tuple may be passed many times.
        if len(shape) > MAX_DIMENSIONS or not all(
            type(side) is int and 0 <= side < MAX_SIDE for side in shape
        ):
            raise ValueError("an array of an impossible shape")
        if math.prod(shape) * dtype.itemsize != len(raw):
            raise ValueError("an array whose shape and data differ in size")
        if isinstance(raw, bytearray):
            array = np.frombuffer(raw, dtype).reshape(shape, order="F" if is_fortran else "C")
            return array.astype(dtype.newbyteorder("="), order="K", copy=False)
        # NumPy adopts the bytes of a pickle like this: without a copy, and writable.
        array = np.ndarray((0,), np.uint8)
        array.__setstate__((1, shape, dtype, is_fortran, raw))  # type: ignore[arg-type]
        return array
