"""What TensorRT-RTX compiled for this GPU, kept on disk: the next start is quicker."""

from __future__ import annotations

import hashlib
import logging
import os
import pathlib

from tap_deploy.errors import TapError
from tap_deploy.files import atomic_file

logger = logging.getLogger(__name__)


class RuntimeCacheFile:
    """One file per engine and version; a file that cannot be read or written is no error."""

    def __init__(self, folder: pathlib.Path, plan: bytes, version: str) -> None:
        digest = hashlib.sha256(plan).hexdigest()[:32]
        self.path = folder / f"tensorrt_rtx-{version}-{digest}.cache"
        self._known = b""

    def read(self) -> bytes | None:
        """Return what was stored, if anything."""
        try:
            self._known = self.path.read_bytes()
        except OSError:
            return None
        return self._known or None

    def write(self, data: bytes) -> None:
        """Store, unless it is what was read."""
        if not data or data == self._known:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path) as partial:
                partial.write_bytes(data)
        except (OSError, TapError) as exc:
            logger.warning("runtime cache not stored: %s", exc)


def default_cache_folder() -> pathlib.Path:
    """Return the folder of this program below the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "tap_deploy"
