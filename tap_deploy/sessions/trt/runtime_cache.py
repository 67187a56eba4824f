"""On-disk cache of the kernels that TensorRT-RTX compiles at run time, for faster starts."""

from __future__ import annotations

import hashlib
import logging
import pathlib

from tap_deploy.errors import TapError
from tap_deploy.storage.files import atomic_file, new_folder
from tap_deploy.storage.regular_files import open_regular

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
            with open_regular(self._path) as file:
                self._known = file.read()
        except OSError:
            return None
        return self._known or None

    def write(self, data: bytes) -> None:
        """Store the bytes, unless they are unchanged since ``read``."""
        if self._path is None or not data or data == self._known:
            return
        try:
            with new_folder(self._path.parent), atomic_file(self._path) as partial:
                partial.write_bytes(data)
        except (OSError, TapError) as exc:
            logger.warning("runtime cache not stored: %s", exc)
