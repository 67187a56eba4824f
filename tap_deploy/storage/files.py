"""Atomic writes of files and folders, output checks, and digests."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import IO

from tap_deploy.errors import InputError
from tap_deploy.storage.folder_lock import locked_folder
from tap_deploy.storage.regular_files import open_regular
from tap_deploy.storage.sync import sync_file, sync_folder, sync_tree
from tap_deploy.storage.unfinished import OLD_SUFFIX, unfinished_path

CHUNK_BYTES = 1 << 22
AT_FDCWD = -100  # renameat2: paths are relative to the working directory
RENAME_EXCHANGE = 2


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a regular file as hex digits; the file is read in chunks."""
    with open_regular(path) as file:
        return sha256_of(file)


def sha256_of(file: IO[bytes]) -> str:
    """Return the SHA-256 of the rest of a file as hex digits."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield a temporary path in the folder of ``path``, and move it to ``path`` on success.

    After a power cut, ``path`` is the old file or the whole new one.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    target = pathlib.Path(path)
    with translated_writes(target), unfinished_path(target.parent, target.name) as partial:
        partial.touch(exist_ok=False)
        yield partial
        sync_file(partial)
        os.replace(partial, target)
        sync_folder(target.parent)


@contextlib.contextmanager
def atomic_folder(
    path: str | os.PathLike[str], *, force: bool = False, marker: str
) -> Iterator[pathlib.Path]:
    """Yield a temporary folder next to ``path``, and move it to ``path`` on success.

    An existing folder at ``path`` stays until then, and is restored if the move fails. After a
    power cut, ``path`` is the old folder or the whole new one. What a killed process leaves, a
    hidden folder ``.NAME.partial-…``, the next one removes; see ``unfinished_path``.

    Args:
        path: the folder to write.
        force: replace an existing folder of the same kind.
        marker: file that identifies a folder of the same kind.

    Raises:
        InputError: see ``check_folder_output``; or the parent cannot be written, or another process
            holds the lock of the folder to replace.
    """
    target = pathlib.Path(os.path.realpath(path))  # Path.resolve fails on a circle of links
    check_folder_output(target, force=force, marker=marker)
    with (
        new_folder(target.parent),
        translated_writes(target),
        unfinished_path(target.parent, target.name) as partial,
    ):
        partial.mkdir()
        yield partial
        sync_tree(partial)
        if force and target.is_dir():
            with locked_folder(target):
                _replace_folder(partial, target)
        else:
            os.rename(partial, target)  # fails if the target is a non-empty folder
        sync_folder(target.parent)


@contextlib.contextmanager
def new_folder(path: pathlib.Path) -> Iterator[None]:
    """Make a folder and its parents, unless they exist, for what the block writes.

    If the block fails, those that were made are removed again, unless they hold something.

    Raises:
        InputError: the folder cannot be made.
    """
    made = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        with translated_writes(path):
            path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def check_file_output(path: str | os.PathLike[str], *, force: bool) -> None:
    """Check that a file can be written, before a long job.

    Raises:
        InputError: the file exists and ``force`` is off, the path is a folder, or its folder
            cannot be written.
    """
    target = pathlib.Path(path)
    if os.path.lexists(target) and not force:
        raise InputError(f"output {target} already exists; pass --force to replace it")
    if target.is_dir():
        raise InputError(f"cannot write {target}: it is a folder; name a file")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise InputError(f"cannot write {target}; choose a folder that can be written")


def check_folder_output(path: str | os.PathLike[str], *, force: bool, marker: str) -> None:
    """Check that a folder can be written or replaced, before a long job.

    Raises:
        InputError: the path exists and ``force`` is off; or it is neither an empty folder nor one
            with the ``marker``, and replacing it would destroy other data; or the parent folder
            cannot be written.
    """
    target = pathlib.Path(path)
    _check_writable(target, target.absolute().parent)
    if not os.path.lexists(target):
        return
    if not force:
        raise InputError(f"output {target} already exists; pass --force to replace it")
    is_ours = target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))
    if not is_ours:
        raise InputError(
            f"output {target} exists and is not a folder with {marker}; --force replaces only "
            "such a folder; choose another output"
        )


def check_folder_for_files(path: pathlib.Path) -> None:
    """Check that files can be written to a folder, which may not exist yet, before a long job.

    Raises:
        InputError: they cannot.
    """
    _check_writable(path, path.absolute())


def _check_writable(target: pathlib.Path, folder: pathlib.Path) -> None:
    holder = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    reason = "Permission denied" if holder.is_dir() else f"{holder} is not a folder"
    if not holder.is_dir() or not os.access(holder, os.W_OK):
        raise InputError(f"cannot write {target}: {reason}; choose a folder that can be written")


@contextlib.contextmanager
def translated_writes(target: pathlib.Path) -> Iterator[None]:
    """Turn an OSError into an InputError that names the target and the reason."""
    try:
        yield
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise InputError(
            f"cannot write {target}: {reason}; choose a folder that can be written"
        ) from exc


def _replace_folder(partial: pathlib.Path, target: pathlib.Path) -> None:
    """Move ``partial`` to ``target``; the old folder is removed here or left at ``partial``."""
    if _exchange(partial, target):
        return
    old = partial.with_name(f"{partial.name}{OLD_SUFFIX}")
    try:
        os.rename(target, old)
        os.rename(partial, target)
    finally:
        if not os.path.lexists(target):
            os.rename(old, target)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Swap two paths atomically; return False if the system cannot (it needs Linux)."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    swapped = renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE)
    return bool(swapped == 0)
