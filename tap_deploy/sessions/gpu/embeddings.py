"""Image embeddings in device memory, recycled when they are garbage-collected."""

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
        """Device address of the embeddings.

        Raises:
            SessionError: the pipeline is closed, and their memory freed.
        """
        if self.store.closed:
            raise SessionError(CLOSED)
        return self._address

    def numpy(self) -> np.ndarray:
        """Copy the embeddings to the host, float32 ``[1, C, grid, grid]``."""
        return self.store.download(self.address)


class EmbeddingStore:
    """Pool of device memory for embeddings; unreferenced embeddings return their memory.

    Encoding picture after picture allocates once; keeping a hundred encoded pictures allocates a
    hundred times.

    Attributes:
        size_bytes: size of the embeddings of one picture, bytes.
        download: copies embeddings from a device address to the host.
        closed: whether the memory is freed.
    """

    def __init__(
        self, memory: DeviceMemory, size_bytes: int, download: Callable[[int], np.ndarray]
    ) -> None:
        self._buffers, self.size_bytes = Buffers(memory), size_bytes
        # The garbage collector may return memory during ``take`` in the same thread. A lock would
        # deadlock; the methods of a deque are atomic.
        self._idle: collections.deque[int] = collections.deque()
        self.download = download
        self.closed = False

    def take(self) -> DeviceEmbeddings:
        """Return memory for the embeddings of one picture; CUDA must be activated."""
        try:
            address = self._idle.pop()
        except IndexError:
            address = self._buffers.device(self.size_bytes)
        embeddings = DeviceEmbeddings(self, address)
        weakref.finalize(embeddings, self._idle.append, address).atexit = False
        return embeddings

    def close(self) -> None:
        """Free all memory, including that of live embeddings."""
        self.closed = True
        self._buffers.close()
