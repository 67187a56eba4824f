"""Files that are either whole or not there, and their digests."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator

from tap_deploy.errors import InputError
from tap_deploy.storage.folder_lock import locked_folder

CHUNK_BYTES = 1 << 22
AT_FDCWD = -100  # renameat2: paths are relative to the working directory
RENAME_EXCHANGE = 2


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as hex digits, reading it in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield a temporary path in the folder of ``path``; move it there if all went well.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    target = pathlib.Path(path)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with translated_writes(target):
            partial.touch(exist_ok=False)
            yield partial
            os.replace(partial, target)
    finally:
        with contextlib.suppress(OSError):  # the error that led here is the one to report
            partial.unlink()


@contextlib.contextmanager
def atomic_folder(
    path: str | os.PathLike[str], *, force: bool = False, marker: str
) -> Iterator[pathlib.Path]:
    """Yield a temporary folder beside ``path``; move it there if all went well.

    What was at ``path`` stays until then, and comes back if the move fails. A process that is
    killed leaves at most a hidden ``.NAME.partial-…`` folder behind.

    Args:
        path: the folder to make.
        force: replace a folder of the same kind.
        marker: the file by which a folder of the same kind is known.

    Raises:
        InputError: see ``check_folder_output``; or the parent cannot be written, or another process
            is changing the folder that is to be replaced.
    """
    target = pathlib.Path(path).resolve()
    check_folder_output(target, force=force, marker=marker)
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        with translated_writes(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            yield partial
            if force and target.is_dir():
                with locked_folder(target):
                    _replace_folder(partial, target)
            else:
                os.rename(partial, target)  # refuses a folder that is not empty
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_file_output(path: str | os.PathLike[str], *, force: bool) -> None:
    """Check before a long job that a file can be written.

    Raises:
        InputError: it exists and ``force`` is off, it is a folder, or its folder cannot be
            written.
    """
    target = pathlib.Path(path)
    if os.path.lexists(target) and not force:
        raise InputError(f"output {target} exists already; pass --force to replace it")
    if target.is_dir():
        raise InputError(f"cannot write {target}: it is a folder; name a file")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise InputError(f"cannot write {target}; choose a folder that can be written")


def check_folder_output(path: str | os.PathLike[str], *, force: bool, marker: str) -> None:
    """Check before a long job that a folder can be made or replaced.

    Raises:
        InputError: something is there and ``force`` is off, or it is neither empty nor a folder
            with the ``marker``, so that replacing it would destroy something else; or the
            folder that would hold it cannot be written.
    """
    target = pathlib.Path(path)
    holder = next(parent for parent in target.absolute().parents if parent.exists())
    if not os.access(holder, os.W_OK):
        raise InputError(
            f"cannot write {target}: Permission denied; choose a folder that can be written"
        )
    if not os.path.lexists(target):
        return
    if not force:
        raise InputError(f"output {target} exists already; pass --force to replace it")
    is_ours = target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))
    if not is_ours:
        raise InputError(
            f"output {target} exists and is not a folder with {marker}; --force replaces only "
            "such a folder; choose another output"
        )


@contextlib.contextmanager
def translated_writes(target: pathlib.Path) -> Iterator[None]:
    """Turn an OSError into an InputError that names what could not be written, and why."""
    try:
        yield
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise InputError(
            f"cannot write {target}: {reason}; choose a folder that can be written"
        ) from exc


def _replace_folder(partial: pathlib.Path, target: pathlib.Path) -> None:
    """Put ``partial`` in the place of ``target``, and ``target`` in the place of ``partial``."""
    if _exchange(partial, target):
        return
    old = partial.with_name(f"{partial.name}.old")
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Swap two paths in one step, where the system can (Linux, most file systems)."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    swapped = renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE)
    return bool(swapped == 0)
