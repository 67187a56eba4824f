"""Tensors of the Open Inference Protocol, in JSON and in its binary extension."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from tap_deploy.errors import InputError

BYTES = "BYTES"
BINARY_SIZE = "binary_data_size"
_LENGTH = struct.Struct("<I")  # before each element of BYTES
_DTYPES: dict[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP32": np.float32,
    "FP64": np.float64,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor of the model.

    Attributes:
        name: its name.
        datatype: of the protocol, such as ``FP32``.
        shape: -1 for any size.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the metadata of the protocol."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


class Loose(BaseModel):
    """A part of a request; fields of extensions are ignored, as the protocol asks."""

    model_config = ConfigDict(strict=True, frozen=True)


class InputTensor(Loose):
    """An input of a request."""

    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=4)]
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)


def array_of(tensor: InputTensor, content: memoryview | None) -> npt.NDArray[Any]:
    """Return an input as an array; elements of BYTES are ``bytes`` objects.

    Args:
        tensor: name, datatype, shape, and data unless that is binary.
        content: the binary data; None if it is in the JSON.

    Raises:
        InputError: datatype, shape and data do not agree.
    """
    name, shape = tensor.name, tensor.shape
    if tensor.datatype == BYTES:
        items = _texts(tensor) if content is None else list(_elements(content, name))
        flat = bytes_array(items, (-1,))
    elif tensor.datatype in _DTYPES:
        flat = _numbers(tensor, content, np.dtype(_DTYPES[tensor.datatype]))
    else:
        expected = ", ".join((*_DTYPES, BYTES))
        raise InputError(f"input {name}: datatype {tensor.datatype!r}; expected one of {expected}")
    if flat.size != math.prod(shape):
        raise InputError(f"input {name}: {flat.size} elements; expected shape {shape}")
    return flat.reshape(shape)


def bytes_array(items: Sequence[bytes], shape: Sequence[int]) -> npt.NDArray[Any]:
    """Return an array of ``bytes`` objects; NumPy's own type of bytes drops zeros at the end."""
    flat = np.empty(len(items), object)
    flat[:] = items
    return flat.reshape(shape)


def _numbers(
    tensor: InputTensor, content: memoryview | None, dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    if content is not None:
        if len(content) % dtype.itemsize:
            raise InputError(
                f"input {tensor.name}: {len(content)} bytes; expected a multiple of "
                f"{dtype.itemsize}"
            )
        return np.frombuffer(content, dtype.newbyteorder("<"))
    try:
        values = np.asarray(tensor.data)
    except ValueError as exc:
        raise InputError(f"input {tensor.name}: data is not an array of numbers") from exc
    if not _fits(values, dtype):
        raise InputError(f"input {tensor.name}: data of {values.dtype}; expected {tensor.datatype}")
    return values.astype(dtype).ravel()


def _fits(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> bool:
    """Whether JSON values can be stored in a type: integers only within its range."""
    if not values.size or dtype.kind == "f":
        return not values.size or values.dtype.kind in "iuf"
    if dtype.kind == "b":
        return values.dtype.kind == "b"
    limits = np.iinfo(dtype)
    within = values.dtype.kind in "iu" and limits.min <= values.min() <= values.max() <= limits.max
    return bool(within)


def _texts(tensor: InputTensor) -> list[bytes]:
    values = tensor.data or []
    if not all(isinstance(value, str) for value in values):
        raise InputError(f"input {tensor.name}: expected a list of texts, or binary data")
    return [value.encode() for value in values]


def _elements(content: memoryview, name: str) -> Iterator[bytes]:
    """Yield the elements of binary BYTES: a length of 4 bytes each, then the content."""
    place = 0
    while place < len(content):
        start = place + _LENGTH.size
        if start > len(content):
            raise InputError(f"input {name}: the binary data ends within a length")
        [length] = _LENGTH.unpack(content[place:start])
        place = start + length
        if place > len(content):
            raise InputError(f"input {name}: the binary data ends within an element")
        yield bytes(content[start:place])


def binary_of(array: npt.NDArray[Any], datatype: str) -> bytes:
    """Return an output as binary data."""
    if datatype == BYTES:
        return b"".join(_LENGTH.pack(len(item)) + item for item in array.ravel())
    return array.astype(np.dtype(_DTYPES[datatype]).newbyteorder("<")).tobytes()


def json_of(array: npt.NDArray[Any], datatype: str) -> list[Any]:
    """Return an output as a flat list of JSON values; BYTES become text."""
    if datatype == BYTES:
        return [item.decode() for item in array.ravel()]
    values: list[Any] = array.ravel().tolist()
    return values
