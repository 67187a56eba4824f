"""On-disk cache of graphs that OpenVINO has compiled for this CPU, for faster starts."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tap_deploy.errors import TapError
from tap_deploy.machine.cpu import cpu_flags
from tap_deploy.machine.host import Host
from tap_deploy.sessions.openvino.core import DEVICE, shared_core, tensor_from_array
from tap_deploy.storage.files import atomic_file, new_folder
from tap_deploy.storage.regular_files import open_regular

logger = logging.getLogger(__name__)

DIGEST_BYTES = hashlib.sha256().digest_size  # at the end of a file: the SHA-256 of the rest


class CompiledCache:
    """The cached forms of one graph, one file per version and settings; I/O errors are not fatal.

    OpenVINO's own cache knows an ONNX file by its path and time, and not its external weights.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        digests: Sequence[str],
        unchanged: Callable[[], bool] = lambda: True,
    ) -> None:
        """Store the arguments.

        Args:
            folder: folder of the cache.
            digests: SHA-256 of the ONNX file and its weights.
            unchanged: whether the files still are those with these digests; asked after compiling.
        """
        self._folder, self._digests, self._unchanged = folder, tuple(digests), unchanged

    def load(self, openvino: Any, settings: Mapping[str, Any]) -> tuple[Any, mmap.mmap] | None:
        """Return the compiled graph, and its mapped file, which it does not keep alive.

        The file is mapped, not read: a start takes a third of the time of compiling, and no memory
        for a copy. None if the graph is not stored, or cannot be read.
        """
        path = self._path(openvino, settings)
        try:
            with open_regular(path) as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            blob = memoryview(mapping)[:-DIGEST_BYTES]
            if hashlib.sha256(blob).digest() != mapping[-DIGEST_BYTES:]:
                raise ValueError("it is damaged")  # OpenVINO would not notice, or crash
            drop_pages(mapping)
            stored = tensor_from_array(openvino, np.frombuffer(blob, np.uint8))
            compiled = shared_core(openvino).import_model(stored, DEVICE, dict(settings))
            drop_pages(mapping)
            return compiled, mapping
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, ValueError) as exc:
            logger.warning("%s cannot be read and is made again: %s", path, exc)
            return None

    def store(self, openvino: Any, settings: Mapping[str, Any], compiled: Any) -> None:
        """Store a graph that was compiled with these settings, unless its files have changed."""
        if not self._unchanged():
            return
        path = self._path(openvino, settings)
        try:
            with new_folder(path.parent), atomic_file(path) as partial:
                blob = compiled.export_model().getbuffer()
                with partial.open("wb") as file:
                    file.write(blob)
                    file.write(hashlib.sha256(blob).digest())
        except (OSError, TapError, RuntimeError) as exc:
            logger.warning("compiled graph not stored: %s", exc)

    def _path(self, openvino: Any, settings: Mapping[str, Any]) -> pathlib.Path:
        """Return the file; its name depends on the CPU, for whose instructions it is compiled."""
        parts = (self._digests, sorted(settings.items()), sorted(cpu_flags(Host())))
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        version = openvino.__version__.partition("-")[0]
        return self._folder / f"openvino-{version}-{digest}.blob"


def drop_pages(mapping: mmap.mmap | None) -> None:
    """Take the pages of a mapped file out of the memory of this process until they are read again.

    OpenVINO copies most weights into a layout of its own.
    """
    if mapping is not None and hasattr(mapping, "madvise"):  # not on Windows
        with contextlib.suppress(OSError):  # pages are locked in memory
            mapping.madvise(mmap.MADV_DONTNEED)
