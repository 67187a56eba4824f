"""On-disk cache of the kernels that TensorRT-RTX compiles at run time, for faster starts."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pathlib

from tap_deploy.errors import TapError
from tap_deploy.storage.files import atomic_file

logger = logging.getLogger(__name__)


class RuntimeCacheFile:
    """The cache file of one engine and TensorRT-RTX version; I/O errors are not fatal."""

    def __init__(self, folder: pathlib.Path | None, plan: bytes, version: str) -> None:
        """Derive the file name; without a folder nothing is stored."""
        digest = hashlib.sha256(plan).hexdigest()[:32]
        self._path = folder and folder / f"tensorrt_rtx-{version}-{digest}.cache"
        self._known = b""

    def read(self) -> bytes | None:
        """Return the stored bytes, or None."""
        if self._path is None:
            return None
        try:
            self._known = self._path.read_bytes()
        except OSError:
            return None
        return self._known or None

    def write(self, data: bytes) -> None:
        """Store the bytes, unless they are unchanged since ``read``."""
        if self._path is None or not data or data == self._known:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._path) as partial:
                partial.write_bytes(data)
        except (OSError, TapError) as exc:
            logger.warning("runtime cache not stored: %s", exc)


def default_cache_folder() -> pathlib.Path | None:
    """Return the default cache folder in the user's home; None for a user without a home.

    There is no fallback to a shared folder: the cached code is executed, and other users could
    write to it.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return pathlib.Path(base or pathlib.Path.home() / ".cache") / "tap_deploy"
    except RuntimeError:  # no HOME and no passwd entry, as in some containers
        _warn_once()
        return None


@functools.cache
def _warn_once() -> None:
    logger.warning(
        "compiled kernels are not cached, so every start is slow: this user has no home folder; "
        "set XDG_CACHE_HOME or DeviceOptions.cache_folder"
    )
