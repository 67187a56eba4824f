"""Reads files from untrusted sources: regular files only, up to a size."""

from __future__ import annotations

import errno
import os
import stat
from typing import IO

Stamp = tuple[int, ...]

# JSON and other text that people and programs write; parsed, it takes about ten times the memory.
TEXT_BYTES = 1 << 26


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file, or a link to one, for reading.

    A pipe would wait for its writer, and a device such as ``/dev/zero`` has no end.

    Raises:
        OSError: the path cannot be opened, or is something else; ``strerror`` says what.
    """
    try:
        # Look before opening: to open a device can have an effect.
        _require_regular(os.stat(path))
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as exc:  # a NUL, or a lone surrogate
        raise OSError(errno.EINVAL, "the name holds characters that no file name has") from exc
    file = open(descriptor, "rb")  # noqa: SIM115  # returned
    try:
        _require_regular(os.fstat(file.fileno()))  # the path may lead elsewhere by now
    except BaseException:
        file.close()
        raise
    return file


def read_bytes(path: str | os.PathLike[str], limit_bytes: int) -> bytes:
    """Return the content of a regular file.

    Args:
        path: the file, or a link to it.
        limit_bytes: largest size, bytes.

    Raises:
        OSError: see ``open_regular``; or the file is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > limit_bytes else file.read(limit_bytes + 1)
    size = max(size, len(content))  # that of a file in /proc is 0
    if size > limit_bytes:
        raise OSError(errno.EFBIG, f"it has {size} bytes; expected at most {limit_bytes}")
    return content


def read_text(path: str | os.PathLike[str], limit_bytes: int = TEXT_BYTES) -> str:
    """Return the content of a UTF-8 text file without its byte order mark.

    Raises:
        OSError: see ``read_bytes``.
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_bytes(path, limit_bytes).decode("utf-8-sig")


def stamp_of(found: os.stat_result) -> Stamp:
    """Return what changes if a file is replaced or written to."""
    times = found.st_mtime_ns, found.st_ctime_ns
    return (found.st_dev, found.st_ino, found.st_size, *times)


def _require_regular(found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device; expected a regular file")
