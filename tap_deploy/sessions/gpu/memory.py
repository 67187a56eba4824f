"""The ``DeviceMemory`` interface: memory, streams and CUDA graphs of a GPU.

Addresses and stream handles are plain integers, as TensorRT and onnxruntime expect them. There are
two implementations, on cuda-python and on pycuda; ``open_device_memory`` selects the installed one.
Only these two modules and ``driver_graphs`` convert CUDA errors to ``SessionError``.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tap_deploy.errors import SessionError

ALIGNMENT_BYTES = 256  # required by TensorRT for tensor addresses; guaranteed by cudaMalloc

_recording = threading.RLock()  # reentrant: ``capture`` may run inside ``undisturbed``


def aligned(size_bytes: int) -> int:
    """Round a size up to a multiple of ``ALIGNMENT_BYTES``."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Prevent interference with a stream capture.

    Only one capture runs at a time in the process, because drivers differ in what other threads may
    do meanwhile. Garbage collection is off, because it may free device memory, which invalidates a
    capture.
    """
    with _recording:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


@dataclasses.dataclass(frozen=True, eq=False)
class PinnedBlock:
    """Page-locked host memory.

    Attributes:
        array: the memory, uint8 ``[size]``.
        device_address: its device address if mapped, else None.
    """

    array: np.ndarray
    device_address: int | None = None


class DeviceMemory(abc.ABC):
    """The CUDA functions that sessions use; all other methods must run inside ``activated``.

    Copies and ``clear`` are asynchronous. Host arrays must be pinned and contiguous, and must not
    be touched until the stream is synchronized.

    Attributes:
        name: package that implements the interface.
        device_index: number of the GPU as CUDA counts it.

    Raises:
        SessionError: from any method, if a CUDA call fails; one line with CUDA's error name.
    """

    name: str
    device_index: int

    @abc.abstractmethod
    def activated(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager that makes the GPU's primary context current in this thread."""

    @property
    @abc.abstractmethod
    def compute_capability(self) -> str:
        """Compute capability, such as ``8.7``."""

    @abc.abstractmethod
    def alloc(self, size_bytes: int) -> int:
        """Allocate device memory, aligned to ``ALIGNMENT_BYTES``, and return its address."""

    @abc.abstractmethod
    def free(self, address: int) -> None:
        """Free device memory of ``alloc``."""

    @abc.abstractmethod
    def alloc_pinned(self, size_bytes: int, *, mapped: bool = False) -> PinnedBlock:
        """Allocate page-locked host memory; if ``mapped``, the GPU can access it directly."""

    @abc.abstractmethod
    def free_pinned(self, block: PinnedBlock) -> None:
        """Free a block of ``alloc_pinned``; its array must not be used afterwards."""

    @abc.abstractmethod
    def copy_to_device(self, address: int, array: np.ndarray, stream: int) -> None:
        """Copy a host array to a device address."""

    @abc.abstractmethod
    def copy_to_host(self, array: np.ndarray, address: int, stream: int) -> None:
        """Copy from a device address to a host array."""

    @abc.abstractmethod
    def copy_on_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Copy between two non-overlapping device ranges."""

    @abc.abstractmethod
    def copy_rows_on_device(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        row_bytes: int,
        rows: int,
        stream: int,
    ) -> None:
        """Copy rows of ``row_bytes`` between two non-overlapping device ranges.

        A pitch is the distance between the starts of two consecutive rows, in bytes.
        """

    @abc.abstractmethod
    def clear(self, address: int, size_bytes: int, stream: int) -> None:
        """Fill with zero bytes."""

    @abc.abstractmethod
    def create_stream(self) -> int:
        """Create a stream that does not synchronise with the default stream; return its handle."""

    @abc.abstractmethod
    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream of ``create_stream``."""

    @abc.abstractmethod
    def synchronize(self, stream: int) -> None:
        """Wait until all work in the stream is done."""

    @abc.abstractmethod
    def record_event(self, stream: int) -> Any:
        """Record a new event with a time stamp in the stream, and return it."""

    @abc.abstractmethod
    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Return the time on the GPU between two events of an idle stream, ms, and free both."""

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Any:
        """Capture the work that ``enqueue`` puts into the stream, and return an executable graph.

        If the capture fails, it is retried once, because the cause may be transient. The stream is
        usable afterwards in either case.
        """
        with undisturbed():
            try:
                return self._capture(stream, enqueue)
            except SessionError:
                return self._capture(stream, enqueue)

    @abc.abstractmethod
    def _capture(self, stream: int, enqueue: Callable[[], None]) -> Any:
        """Capture once, in thread-local mode, so that other threads may allocate meanwhile."""

    @abc.abstractmethod
    def launch(self, graph: Any, stream: int) -> None:
        """Enqueue a captured graph in a stream."""

    @abc.abstractmethod
    def destroy_graph(self, graph: Any) -> None:
        """Destroy a graph of ``capture``."""
