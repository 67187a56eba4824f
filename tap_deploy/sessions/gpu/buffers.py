"""Long-lived buffers: device memory, pinned memory, and staged tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import numpy as np

from tap_deploy.errors import SessionError
from tap_deploy.sessions.gpu.memory import DeviceMemory, aligned


class Buffers:
    """A group of allocations that are freed together, in reverse order."""

    def __init__(self, memory: DeviceMemory) -> None:
        self.memory = memory
        self._frees: list[Callable[[], None]] = []

    def device(self, size_bytes: int) -> int:
        """Allocate device memory and return its address."""
        address = self.memory.alloc(aligned(max(1, size_bytes)))
        self._frees.append(lambda: self.memory.free(address))
        return address

    def staged(self, size_bytes: int, *, zero_copy: bool = False) -> StagedTensor:
        """Allocate a staged tensor; with ``zero_copy``, one mapped block serves both sides."""
        block = self.memory.alloc_pinned(aligned(max(1, size_bytes)), mapped=zero_copy)
        self._frees.append(lambda: self.memory.free_pinned(block))
        if block.device_address is not None:
            return StagedTensor(self.memory, block.device_address, block.array, mapped=True)
        return StagedTensor(self.memory, self.device(size_bytes), block.array, mapped=False)

    def pinned(self, size_bytes: int) -> np.ndarray:
        """Allocate page-locked host memory, uint8 ``[size_bytes]``."""
        block = self.memory.alloc_pinned(aligned(max(1, size_bytes)))
        self._frees.append(lambda: self.memory.free_pinned(block))
        return block.array[:size_bytes]

    def stream(self) -> int:
        """Create a stream and return its handle."""
        stream = self.memory.create_stream()
        self._frees.append(lambda: self.memory.destroy_stream(stream))
        return stream

    def close(self) -> None:
        """Free everything; an error of one allocation does not keep the others alive."""
        while self._frees:
            with contextlib.suppress(SessionError):
                self._frees.pop()()


class StagedTensor:
    """Device memory with a pinned host array, or one block of mapped host memory for both.

    Attributes:
        memory: the GPU.
        address: device address, for the graphs.
        mapped: whether both sides are the same memory.
    """

    def __init__(
        self, memory: DeviceMemory, address: int, array: np.ndarray, *, mapped: bool
    ) -> None:
        self.memory, self.address, self.mapped = memory, address, mapped
        self._bytes = array

    def view(self, shape: Sequence[int], dtype: str) -> np.ndarray:
        """Return a view of the host side with the given shape and dtype."""
        count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return self._bytes[:count].view(dtype).reshape(shape)

    def upload(self, array: np.ndarray, stream: int) -> None:
        """Copy an array to the host side and enqueue the transfer to the device."""
        staged = self.view(array.shape, array.dtype.name)
        np.copyto(staged, array)
        if not self.mapped:
            self.memory.copy_to_device(self.address, staged, stream)

    def download(self, shape: Sequence[int], dtype: str, stream: int) -> np.ndarray:
        """Enqueue the transfer to the host; the array is valid after the stream is synchronized."""
        staged = self.view(shape, dtype)
        if not self.mapped:
            self.memory.copy_to_host(staged, self.address, stream)
        return staged
