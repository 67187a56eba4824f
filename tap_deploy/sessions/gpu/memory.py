"""Memory, streams and graphs of a GPU, behind one small contract.

Addresses and stream handles are plain integers: that is what TensorRT and onnxruntime take.
Two packages can stand behind it, cuda-python and pycuda; ``open_device_memory`` takes the one
that is there. Foreign errors are translated in their two modules and in ``driver_graphs``, and
nowhere else.
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

ALIGNMENT_BYTES = 256  # what TensorRT asks of every tensor address, and cudaMalloc gives

_recording = threading.RLock()  # what calls ``capture`` may be undisturbed already


def aligned(size_bytes: int) -> int:
    """Round a size up, so that what follows is aligned."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keep away, while something is recorded, what would spoil it.

    One recording at a time in the process: what drivers allow two threads to do meanwhile differs.
    No garbage collection: it may free memory of the GPU, which a recording does not allow.
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
    """Page-locked host memory: uint8 ``[size]``, and its device address if it is mapped."""

    array: np.ndarray
    device_address: int | None = None


class DeviceMemory(abc.ABC):
    """What the sessions need of CUDA. Every method but ``activated`` must run inside it.

    Copies and ``clear`` are put into a stream and return at once; host arrays must be pinned,
    contiguous, and left alone until the stream was synchronized.

    Raises:
        SessionError: CUDA refused, whatever the method; one line with CUDA's name for it.
    """

    name: str
    device_index: int

    @abc.abstractmethod
    def activated(self) -> contextlib.AbstractContextManager[Any]:
        """Make the GPU's primary context current in this thread."""

    @property
    @abc.abstractmethod
    def compute_capability(self) -> str:
        """The architecture, such as ``8.7``."""

    @abc.abstractmethod
    def alloc(self, size_bytes: int) -> int:
        """Return the address of new memory, aligned to ``ALIGNMENT_BYTES``."""

    @abc.abstractmethod
    def free(self, address: int) -> None:
        """Give back what ``alloc`` returned."""

    @abc.abstractmethod
    def alloc_pinned(self, size_bytes: int, *, mapped: bool = False) -> PinnedBlock:
        """Return page-locked host memory; mapped, the GPU can use it where it is."""

    @abc.abstractmethod
    def free_pinned(self, block: PinnedBlock) -> None:
        """Give back what ``alloc_pinned`` returned; its array must not be used afterwards."""

    @abc.abstractmethod
    def copy_to_device(self, address: int, array: np.ndarray, stream: int) -> None:
        """Copy a host array to an address."""

    @abc.abstractmethod
    def copy_to_host(self, array: np.ndarray, address: int, stream: int) -> None:
        """Fill a host array from an address."""

    @abc.abstractmethod
    def copy_on_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Copy between two addresses that do not overlap."""

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
        """Copy rows of ``row_bytes`` each between two addresses that do not overlap.

        A pitch is the distance in bytes from the beginning of one row to that of the next.
        """

    @abc.abstractmethod
    def clear(self, address: int, size_bytes: int, stream: int) -> None:
        """Fill with zero bytes."""

    @abc.abstractmethod
    def create_stream(self) -> int:
        """Return the handle of a stream that does not wait for the default stream."""

    @abc.abstractmethod
    def destroy_stream(self, stream: int) -> None:
        """Give back what ``create_stream`` returned."""

    @abc.abstractmethod
    def synchronize(self, stream: int) -> None:
        """Wait until everything in the stream has happened."""

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Any:
        """Record what ``enqueue`` puts into the stream, without doing it; return a graph.

        ``enqueue`` is called again if the first recording fails: what spoilt it may be over. The
        stream is usable again whether that works or not.
        """
        with undisturbed():
            try:
                return self._capture(stream, enqueue)
            except SessionError:
                return self._capture(stream, enqueue)

    @abc.abstractmethod
    def _capture(self, stream: int, enqueue: Callable[[], None]) -> Any:
        """Record once, in CUDA's thread-local mode: other threads may allocate meanwhile."""

    @abc.abstractmethod
    def launch(self, graph: Any, stream: int) -> None:
        """Put a recorded graph into a stream: the same work at the same addresses."""

    @abc.abstractmethod
    def destroy_graph(self, graph: Any) -> None:
        """Give back what ``capture`` returned."""
