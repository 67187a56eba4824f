"""Buffers that are allocated once: device memory, and tensors that host and GPU both see."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import numpy as np

from tap_deploy.errors import SessionError
from tap_deploy.sessions.gpu.memory import DeviceMemory, aligned


class Buffers:
    """Everything that was allocated for one purpose, freed together and last first."""

    def __init__(self, memory: DeviceMemory) -> None:
        self.memory = memory
        self._frees: list[Callable[[], None]] = []

    def device(self, size_bytes: int) -> int:
        """Return the address of device memory."""
        address = self.memory.alloc(aligned(max(1, size_bytes)))
        self._frees.append(lambda: self.memory.free(address))
        return address

    def staged(self, size_bytes: int, *, zero_copy: bool = False) -> StagedTensor:
        """Return memory on both sides; with ``zero_copy`` it is one and the same."""
        block = self.memory.alloc_pinned(aligned(max(1, size_bytes)), mapped=zero_copy)
        self._frees.append(lambda: self.memory.free_pinned(block))
        if block.device_address is not None:
            return StagedTensor(self.memory, block.device_address, block.array, mapped=True)
        return StagedTensor(self.memory, self.device(size_bytes), block.array, mapped=False)

    def pinned(self, size_bytes: int) -> np.ndarray:
        """Return page-locked host memory, uint8 ``[size_bytes]``."""
        block = self.memory.alloc_pinned(aligned(max(1, size_bytes)))
        self._frees.append(lambda: self.memory.free_pinned(block))
        return block.array[:size_bytes]

    def stream(self) -> int:
        """Return the handle of a stream."""
        stream = self.memory.create_stream()
        self._frees.append(lambda: self.memory.destroy_stream(stream))
        return stream

    def close(self) -> None:
        """Free everything; what CUDA refuses to free does not keep the rest."""
        while self._frees:
            with contextlib.suppress(SessionError):
                self._frees.pop()()


class StagedTensor:
    """Device memory with a pinned array beside it, or mapped host memory that is both.

    ``address`` is what a graph is given. The array is written before ``upload``, and read after
    ``download`` and a synchronization.
    """

    def __init__(
        self, memory: DeviceMemory, address: int, array: np.ndarray, *, mapped: bool
    ) -> None:
        self.memory, self.address, self.mapped = memory, address, mapped
        self._bytes = array

    def view(self, shape: Sequence[int], dtype: str) -> np.ndarray:
        """Return the first bytes of the host side as an array."""
        count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return self._bytes[:count].view(dtype).reshape(shape)

    def upload(self, array: np.ndarray, stream: int) -> None:
        """Write an array into the host side and send it to the device side."""
        staged = self.view(array.shape, array.dtype.name)
        np.copyto(staged, array)
        if not self.mapped:
            self.memory.copy_to_device(self.address, staged, stream)

    def download(self, shape: Sequence[int], dtype: str, stream: int) -> np.ndarray:
        """Fetch a whole tensor; the array is valid once the stream was synchronized."""
        staged = self.view(shape, dtype)
        if not self.mapped:
            self.memory.copy_to_host(staged, self.address, stream)
        return staged
