"""Reads the fields of protobuf messages without a schema, for files from untrusted sources."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

from tap_deploy.storage.regular_files import open_regular

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4, groups, are obsolete
_SIZES = {FIXED64: 8, FIXED32: 4}
MAX_VARINT_BYTES = 10
MAX_TAG = (1 << 32) - 1
MAX_FIELDS = 2_000_000  # of a file; a graph of the largest model has 40 000


class MessageFile:
    """A file that is a message, mapped into memory; its messages have a limited number of fields.

    Attributes:
        message: the whole message.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Map a file.

        Raises:
            OSError: see ``open_regular``.
            ValueError: it is empty.
        """
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size == 0:  # cannot be mapped
                raise ValueError("it is empty")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.message = memoryview(mapped)
        self._fields_left = MAX_FIELDS

    def fields(self, data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
        """Yield number and value of each field of a message in the file; see ``fields``.

        Raises:
            ValueError: see ``fields``; or more than ``MAX_FIELDS`` were read of the file.
        """
        for field in fields(data):
            self._fields_left -= 1
            if self._fields_left < 0:
                raise ValueError(f"it has more than {MAX_FIELDS} fields")
            yield field


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of each field of a message; nothing is copied.

    Args:
        data: the encoded message, bytes.

    Yields:
        The number of the field, and its value: an int for a varint, else its bytes.

    Raises:
        ValueError: this is no complete message, or it holds groups.
    """
    place, end = 0, len(data)
    while place < end:
        tag, place = _varint(data, place)
        if tag > MAX_TAG:  # others cut it to 32 bits, and find another field
            raise ValueError("a protobuf field with a number of more than 29 bits")
        kind = tag & 7
        if kind == VARINT:
            number, place = _varint(data, place)
            yield tag >> 3, number
            continue
        if kind == BYTES:
            size, place = _varint(data, place)
        elif kind in _SIZES:
            size = _SIZES[kind]
        else:
            raise ValueError(f"a protobuf field of kind {kind}")
        if size > end - place:
            raise ValueError("a protobuf field that is longer than its message")
        yield tag >> 3, data[place : place + size]
        place += size


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """Return a variable-length number and the place behind it."""
    value = shift = 0
    while place < len(data) and shift < 7 * MAX_VARINT_BYTES:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise ValueError("a protobuf number without an end")
