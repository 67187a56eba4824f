"""A disk that is soon full, for tests that may mount one."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size_bytes: int) -> Iterator[pathlib.Path]:
    """Mount a disk in memory at a new folder; only root may.

    Raises:
        OSError, subprocess.CalledProcessError: it cannot be mounted here.
    """
    folder.mkdir()
    options = f"size={size_bytes}"
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


@contextlib.contextmanager
def room_left(disk: pathlib.Path, num_bytes: int) -> Iterator[None]:
    """Fill a disk up to some bytes, rounded up to pages, while the block runs."""
    ballast, state = disk / "ballast", os.statvfs(disk)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, state.f_bavail * state.f_frsize - num_bytes))
    try:
        yield
    finally:
        ballast.unlink()


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as name:
        try:
            with small_disk(pathlib.Path(name, "disk"), 1 << 20):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


needs_mount = pytest.mark.skipif(not can_mount(), reason="may not mount a small disk; run as root")
