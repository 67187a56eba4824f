"""Writes that survive a power cut: files and folders are on the disk before they are moved."""

from __future__ import annotations

import errno
import os
import pathlib

# Some file systems cannot do this for folders.
_NOT_FOR_FOLDERS = (errno.EINVAL, errno.EACCES, errno.ENOTSUP, errno.EBADF)


def sync_file(path: str | os.PathLike[str]) -> None:
    """Wait until the content of a file is on the disk.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Wait until the names in a folder are on the disk.

    Raises:
        OSError: they cannot be written.
    """
    try:
        sync_file(path)
    except OSError as exc:
        if exc.errno not in _NOT_FOR_FOLDERS:
            raise


def sync_tree(folder: pathlib.Path) -> None:
    """Wait until all files and folders below a folder, and itself, are on the disk.

    Raises:
        OSError: they cannot be written.
    """
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not os.path.islink(os.path.join(parent, name)):
                sync_file(os.path.join(parent, name))
        sync_folder(parent)
