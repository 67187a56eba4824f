"""A lock that admits one writer to a folder at a time and names its holder."""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import os
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Iterator

from tap_deploy.errors import InputError

logger = logging.getLogger(__name__)
LOCK_NAME = ".tap_deploy.lock"
WAIT_SECONDS = 60.0
QUIET_SECONDS = 1.0  # no log line for shorter waits; most writers finish sooner
POLL_SECONDS = 0.05
MOST_HOLDER_BYTES = 1000


@contextlib.contextmanager
def locked_folder(folder: pathlib.Path) -> Iterator[None]:
    """Lock a folder against other writers while the block changes it.

    The lock is a file lock (``flock``) on ``.tap_deploy.lock`` in the folder, so the system
    releases it however the process ends. The file names the holder, and is removed at the end.
    The lock is not reentrant. Readers need no lock.

    If locks are not available (no ``fcntl``, a file system without locks), the block runs without
    one, after a warning. In a folder without write permission, it runs without lock and warning.

    Raises:
        InputError: another process holds the lock for ``WAIT_SECONDS``.
    """
    path = folder / LOCK_NAME
    descriptor = _acquired(path)
    try:
        yield
    finally:
        if descriptor is not None:
            if _is_at(path, descriptor):  # not so if the folder was replaced meanwhile
                with contextlib.suppress(OSError):
                    path.unlink()
            os.close(descriptor)


def _acquired(path: pathlib.Path) -> int | None:
    """Return the descriptor of the locked file; None if locks are not available."""
    started, told = time.monotonic(), False
    while True:
        try:
            import fcntl

            descriptor = _opened(path)
        except (OSError, ImportError) as exc:
            if os.access(path.parent, os.W_OK):
                _warn(path.parent, str(exc))
            return None
        locked = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder may have removed the file, or replaced the folder, meanwhile.
            locked = _is_at(path, descriptor)
            if locked:
                _sign(descriptor)
                return descriptor
        except BlockingIOError:
            holder = _holder(descriptor)
        except OSError as exc:
            _warn(path.parent, str(exc))
            return None
        else:
            continue
        finally:
            if not locked:
                os.close(descriptor)
        told = _wait(path.parent, holder, time.monotonic() - started, told)


def _opened(path: pathlib.Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except PermissionError:  # the file belongs to another user of this folder
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def _wait(folder: pathlib.Path, holder: str, waited: float, told: bool) -> bool:
    """Sleep for ``POLL_SECONDS``; return whether the wait has been logged."""
    if waited >= WAIT_SECONDS:
        raise InputError(
            f"{folder} has been held by {holder} for more than {WAIT_SECONDS:.0f} s; wait until "
            "that process ends, or stop it, then repeat this command"
        )
    if waited >= QUIET_SECONDS and not told:
        logger.warning("waiting for %s, which is being changed by %s", folder, holder)
        told = True
    time.sleep(POLL_SECONDS)
    return told


def _sign(descriptor: int) -> None:
    """Write the holder into the lock file; errors, such as a full disk, do not matter."""
    # Only the first argument: other users can read the file, and further ones may hold secrets.
    command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:2]])
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    text = f"process {os.getpid()} on {platform.node()} since {since} ({command})"
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, os.fsencode(text)[:MOST_HOLDER_BYTES], 0)


def _holder(descriptor: int) -> str:
    try:
        text = os.pread(descriptor, MOST_HOLDER_BYTES, 0)
    except OSError:
        text = b""
    return os.fsdecode(text) or "another process"


def _is_at(path: pathlib.Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


@functools.cache  # one warning per folder: a command changes a bundle several times
def _warn(folder: pathlib.Path, reason: str) -> None:
    logger.warning(
        "%s cannot be locked (%s): do not run two commands that change it at a time", folder, reason
    )
