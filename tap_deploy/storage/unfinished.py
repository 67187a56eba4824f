"""Paths for unfinished files and folders, which do not outlive the process that made them.

An unfinished path is ``.NAME.partial-HEX``. Its process holds a lock (``flock``) on the file
``.NAME.partial-HEX.lock`` beside it, which the system releases however the process ends. The next
process that makes an unfinished path in the same folder removes those that nobody holds. Locks also
hold between containers of a host; process numbers would not.

Between hosts they hold on some file systems only: not on NFS with ``local_lock``, sshfs, or folders
that a virtual machine shares. So the lock file names the host and its start, and what was made on
another one, or before a restart, is removed only when its lock file is older than a day.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pathlib
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator

LOCK_SUFFIX = ".lock"
OLD_SUFFIX = ".old"  # a complete folder, while the unfinished one takes its place
_LOCK = re.compile(r"\.(?P<name>.+)\.partial-[0-9a-f]{8}\.lock", re.DOTALL)
_MOST_NAME_BYTES = 200  # file systems allow 255 for a name; ours adds 28
_BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")  # one per start of a Linux kernel
_DAY_SECONDS = 24 * 3600
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def unfinished_path(folder: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
    """Yield a path for a temporary file or folder; whatever is there at the end is removed.

    If the process is killed, the next one that calls this for ``folder`` removes it, on another
    host a day later. On a file system without locks it stays.

    Args:
        folder: an existing folder.
        name: name of the file or folder that is being made, which becomes part of the path.

    Raises:
        OSError: the folder cannot be written.
    """
    _remove_abandoned_once(os.path.realpath(folder))
    path, descriptor = _locked_path(folder, name)
    try:
        yield path
    finally:
        _clear(path, folder / name)
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def temporary_folder() -> Iterator[pathlib.Path]:
    """Yield an empty folder where temporary files belong (``TMPDIR``); see ``unfinished_path``.

    Raises:
        OSError: it cannot be made.
    """
    with unfinished_path(pathlib.Path(tempfile.gettempdir()), "tap_deploy") as path:
        path.mkdir(mode=0o700)
        yield path


def remove_abandoned(folder: str | os.PathLike[str]) -> None:
    """Remove the unfinished paths of a folder that no living process holds; see above for hosts.

    A folder that was about to be replaced is put back, if nothing has taken its place.
    """
    try:
        with os.scandir(folder) as entries:
            found = [match for entry in entries if (match := _LOCK.fullmatch(entry.name))]
    except OSError:
        return
    for match in found:
        lock = pathlib.Path(folder, match.string)
        with contextlib.suppress(OSError, ImportError):  # held, or of another user
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
            try:
                path = lock.with_name(match.string.removesuffix(LOCK_SUFFIX))
                if _is_locked(lock, descriptor) and _is_abandoned(path, descriptor):
                    is_whole = len(os.fsencode(match["name"])) < _MOST_NAME_BYTES
                    _clear(path, lock.with_name(match["name"]) if is_whole else None)
            finally:
                os.close(descriptor)


@functools.lru_cache(maxsize=1024)  # a folder may have many files, and get many more
def _remove_abandoned_once(folder: str) -> None:
    remove_abandoned(folder)


def _locked_path(folder: pathlib.Path, name: str) -> tuple[pathlib.Path, int | None]:
    """Return a new path and the descriptor of its lock; None if locks are not available."""
    stem = os.fsdecode(os.fsencode(name)[:_MOST_NAME_BYTES])
    while True:
        path = folder / f".{stem}.partial-{secrets.token_hex(4)}"
        lock = _lock_of(path)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            if _is_locked(lock, descriptor):
                _sign(descriptor)
                return path, descriptor
        except (OSError, ImportError) as exc:
            if isinstance(exc, BlockingIOError):  # another process is about to remove it
                os.close(descriptor)
                continue
            with contextlib.suppress(OSError):
                lock.unlink()
            os.close(descriptor)
            if isinstance(exc, ImportError) or exc.errno in _NO_LOCKS:
                return path, None
            raise
        os.close(descriptor)  # another process has removed it before it was locked


def _is_locked(lock: pathlib.Path, descriptor: int) -> bool:
    """Lock a file; return False if it is no longer at its path.

    Raises:
        BlockingIOError: another process, or thread, holds the lock.
        OSError, ImportError: locks are not available.
    """
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        return os.path.samestat(os.stat(lock), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Write the start of this host and its name into a lock file; a full disk does not matter."""
    with contextlib.suppress(OSError):
        os.write(descriptor, f"{_boot_id()} {platform.node()}".encode(errors="replace"))


def _is_abandoned(path: pathlib.Path, descriptor: int) -> bool:
    """Whether no process can still use a path whose lock file this process has locked."""
    if not os.fstat(descriptor).st_size and not any(map(os.path.lexists, (path, _old_of(path)))):
        return True  # killed before it signed; if it lives elsewhere, it loses only its lock
    boot_id = _boot_id()
    if boot_id and os.pread(descriptor, len(boot_id), 0) == boot_id.encode():
        return True
    return time.time() - os.fstat(descriptor).st_mtime > _DAY_SECONDS


@functools.cache
def _boot_id() -> str:
    """Return what all processes on this kernel, also in containers, have in common, or ""."""
    try:
        return _BOOT_ID.read_text("ascii").strip()
    except (OSError, ValueError):
        return ""


def _lock_of(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + LOCK_SUFFIX)


def _old_of(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + OLD_SUFFIX)


def _clear(path: pathlib.Path, target: pathlib.Path | None) -> None:
    """Remove an unfinished path, then its lock file; put back what it was about to replace.

    If something stays, the lock file does, too, so that the next process goes on.

    Args:
        path: the unfinished path.
        target: what it was to become; None if its name is too long to be known, and then a folder
            that it was about to replace, perhaps the only copy, is left alone.
    """
    old = _old_of(path)
    if target is not None:
        if not os.path.lexists(target):
            with contextlib.suppress(OSError):
                os.rename(old, target)
        if os.path.lexists(target):
            shutil.rmtree(old, ignore_errors=True)
    _remove(path)
    if not os.path.lexists(path) and not os.path.lexists(old):
        with contextlib.suppress(OSError):
            _lock_of(path).unlink()


def _remove(path: pathlib.Path) -> None:
    """Remove a file or folder, if there is one; errors do not matter."""
    try:
        path.unlink()
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
