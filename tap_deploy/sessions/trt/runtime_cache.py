"""What TensorRT-RTX compiled for this GPU, kept on disk: the next start is quicker."""

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
    """One file per engine and version; a file that cannot be read or written is no error."""

    def __init__(self, folder: pathlib.Path | None, plan: bytes, version: str) -> None:
        """Choose the file; without a folder nothing is kept."""
        digest = hashlib.sha256(plan).hexdigest()[:32]
        self._path = folder and folder / f"tensorrt_rtx-{version}-{digest}.cache"
        self._known = b""

    def read(self) -> bytes | None:
        """Return what was stored, if anything."""
        if self._path is None:
            return None
        try:
            self._known = self._path.read_bytes()
        except OSError:
            return None
        return self._known or None

    def write(self, data: bytes) -> None:
        """Store, unless it is what was read."""
        if self._path is None or not data or data == self._known:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._path) as partial:
                partial.write_bytes(data)
        except (OSError, TapError) as exc:
            logger.warning("runtime cache not stored: %s", exc)


def default_cache_folder() -> pathlib.Path | None:
    """Return the folder of this program below the user's cache folder; None for a user without.

    There is no other place: what others could write in a shared folder would be run.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return pathlib.Path(base or pathlib.Path.home() / ".cache") / "tap_deploy"
    except RuntimeError:  # no HOME, and a user id without a name, as containers have them
        _warn_once()
        return None


@functools.cache
def _warn_once() -> None:
    logger.warning(
        "nothing compiled is kept, each start takes longer: this user has no home folder; "
        "set XDG_CACHE_HOME or DeviceOptions.cache_folder"
    )
