"""Files that are either whole or not there, and their digests."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from tap_deploy.errors import InputError

CHUNK_BYTES = 1 << 22


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
    with _translated(target):
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
    partial = pathlib.Path(name)
    try:
        yield partial
        with _translated(target):
            partial.chmod(0o666 & ~_umask())
            os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[pathlib.Path]:
    """Yield a temporary folder beside ``path``; move it there if all went well.

    A process that is killed leaves at most a hidden ``.NAME.partial-…`` folder behind.

    Args:
        path: the folder to make.
        force: replace what is there.

    Raises:
        InputError: something is there and ``force`` is off, or the parent cannot be written.
    """
    target = pathlib.Path(path)
    check_output(target, force=force)
    with _translated(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{target.name}.partial-"
        partial = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        yield partial
        with _translated(target):
            partial.chmod(0o777 & ~_umask())
            _move_over(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(path: str | os.PathLike[str], *, force: bool) -> None:
    """Refuse to overwrite: raise InputError if ``path`` exists and ``force`` is off."""
    if os.path.lexists(path) and not force:
        raise InputError(f"output {path} exists already; pass --force to replace it")


def _move_over(partial: pathlib.Path, target: pathlib.Path) -> None:
    """Put ``partial`` in the place of ``target``; a folder cannot be replaced in one call."""
    old = partial.with_name(partial.name + ".old")
    if os.path.lexists(target):
        os.replace(target, old)
    os.replace(partial, target)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


@contextlib.contextmanager
def _translated(target: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise InputError(
            f"cannot write {target}: {exc.strerror or exc}; choose a folder that can be written"
        ) from exc


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
