"""Image embeddings that stay on the GPU for as long as a program refers to them."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable

import numpy as np

from tap_deploy.errors import SessionError
from tap_deploy.sessions.gpu.buffers import Buffers
from tap_deploy.sessions.gpu.memory import DeviceMemory
from tap_deploy.sessions.pipeline import CLOSED, Embeddings
from tap_deploy.sessions.processes import ProcessBound


class DeviceEmbeddings(Embeddings, ProcessBound):
    """Embeddings of one picture in device memory, in the dtype of the graphs."""

    def __init__(self, store: EmbeddingStore, address: int) -> None:
        self.store, self._address = store, address

    @property
    def address(self) -> int:
        """Where they lie.

        Raises:
            SessionError: their memory was freed with the pipeline.
        """
        if self.store.closed:
            raise SessionError(CLOSED)
        return self._address

    def numpy(self) -> np.ndarray:
        """Fetch them as float32 ``[1, C, grid, grid]``."""
        return self.store.download(self.address)


class EmbeddingStore:
    """Device memory for embeddings; memory that nothing refers to any more is used again.

    A program that encodes picture after picture allocates once; one that keeps a hundred encoded
    pictures allocates a hundred times.
    """

    def __init__(
        self, memory: DeviceMemory, size_bytes: int, download: Callable[[int], np.ndarray]
    ) -> None:
        self._buffers, self.size_bytes = Buffers(memory), size_bytes
        # The garbage collector may give memory back in the middle of ``take``, in the same
        # thread: a lock would wait for itself, but the methods of a deque are atomic.
        self._idle: collections.deque[int] = collections.deque()
        self.download = download
        self.closed = False

    def take(self) -> DeviceEmbeddings:
        """Return memory for one picture; CUDA must be activated."""
        try:
            address = self._idle.pop()
        except IndexError:
            address = self._buffers.device(self.size_bytes)
        embeddings = DeviceEmbeddings(self, address)
        weakref.finalize(embeddings, self._idle.append, address).atexit = False
        return embeddings

    def close(self) -> None:
        """Free all of it, even what is still referred to."""
        self.closed = True
        self._buffers.close()
