"""``DeviceMemory`` on pycuda, which builds against the CUDA of any JetPack."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tap_deploy.errors import SessionError, first_line
from tap_deploy.optional_modules import load_module
from tap_deploy.sessions.gpu.driver_graphs import DriverGraphs
from tap_deploy.sessions.gpu.memory import DeviceMemory, PinnedBlock

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING; pycuda has no name for it


@functools.cache
def _primary_context(driver: Any, device_index: int) -> tuple[Any, Any]:
    """Return a GPU and its primary context, retained until the process ends.

    It is never released: pycuda's destructor pushes a context that is not current, releases it, and
    does not pop it. ``pycuda.autoprimaryctx`` is no alternative: it leaves the context on the stack
    of the importing thread, and pycuda aborts the process when that thread ends.
    """
    driver.init()
    device = driver.Device(device_index)
    return device, device.retain_primary_context()


class PycudaMemory(DeviceMemory):
    """``DeviceMemory`` on ``pycuda.driver``.

    It uses the GPU's primary context, like TensorRT and torch. ``pycuda.autoinit`` would create
    another context, in which their addresses are invalid. A thread must push the context before
    using it; ``activated`` does so.
    """

    name = "pycuda"

    def __init__(self, device_index: int = 0) -> None:
        self._driver: Any = load_module("pycuda.driver")  # ImportError if not installed
        self.device_index = device_index
        with self._translated("primary context"):
            self._device, self._context = _primary_context(self._driver, device_index)
        self._streams: dict[int, Any] = {}
        self._allocations: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}

    @contextlib.contextmanager
    def activated(self) -> Iterator[None]:
        """Push the primary context, and pop it afterwards."""
        with self._translated("Context.push"):
            self._context.push()
        try:
            yield
        finally:
            self._context.pop()

    @property
    def compute_capability(self) -> str:
        """Compute capability, such as ``8.7``."""
        with self._translated("Device.compute_capability"):
            major, minor = self._device.compute_capability()
        return f"{major}.{minor}"

    def alloc(self, size_bytes: int) -> int:
        """Allocate device memory and return its address."""
        with self._translated("mem_alloc"):
            allocation = self._driver.mem_alloc(size_bytes)
        self._allocations[int(allocation)] = allocation
        return int(allocation)

    def free(self, address: int) -> None:
        """Free device memory."""
        with self._translated("DeviceAllocation.free"):
            self._allocations.pop(address).free()

    def alloc_pinned(self, size_bytes: int, *, mapped: bool = False) -> PinnedBlock:
        """Allocate page-locked host memory."""
        flags = self._driver.host_alloc_flags.DEVICEMAP if mapped else 0
        with self._translated("pagelocked_empty"):
            array = self._driver.pagelocked_empty(size_bytes, np.uint8, mem_flags=flags)
            device_address = int(array.base.get_device_pointer()) if mapped else None
        self._pinned[array.ctypes.data] = array.base
        return PinnedBlock(array, device_address)

    def free_pinned(self, block: PinnedBlock) -> None:
        """Free page-locked host memory."""
        with self._translated("PagelockedHostAllocation.free"):
            self._pinned.pop(block.array.ctypes.data).free()

    def copy_to_device(self, address: int, array: np.ndarray, stream: int) -> None:
        """Copy a host array to a device address."""
        with self._translated("memcpy_htod_async"):
            self._driver.memcpy_htod_async(address, array, self._streams[stream])

    def copy_to_host(self, array: np.ndarray, address: int, stream: int) -> None:
        """Copy from a device address to a host array."""
        with self._translated("memcpy_dtoh_async"):
            self._driver.memcpy_dtoh_async(array, address, self._streams[stream])

    def copy_on_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Copy between two device addresses."""
        with self._translated("memcpy_dtod_async"):
            self._driver.memcpy_dtod_async(target, source, size_bytes, self._streams[stream])

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
        """Copy rows between two device addresses."""
        with self._translated("Memcpy2D"):
            copy = self._driver.Memcpy2D()
            copy.set_src_device(source)
            copy.set_dst_device(target)
            copy.src_pitch, copy.dst_pitch = source_pitch, target_pitch
            copy.width_in_bytes, copy.height = row_bytes, rows
            copy(self._streams[stream])

    def clear(self, address: int, size_bytes: int, stream: int) -> None:
        """Fill with zero bytes."""
        with self._translated("memset_d8_async"):
            self._driver.memset_d8_async(address, 0, size_bytes, self._streams[stream])

    def create_stream(self) -> int:
        """Create a stream and return its handle."""
        with self._translated("Stream"):
            stream = self._driver.Stream(NON_BLOCKING)
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream by dropping its last reference."""
        del self._streams[stream]

    def synchronize(self, stream: int) -> None:
        """Wait for a stream."""
        with self._translated("Stream.synchronize"):
            self._streams[stream].synchronize()

    def record_event(self, stream: int) -> Any:
        """Record a new event."""
        with self._translated("Event"):
            event = self._driver.Event()
            event.record(self._streams[stream])
        return event

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Return the time between two events, ms; dropping their last reference frees them."""
        with self._translated("Event.time_since"):
            return float(end.time_since(start))

    @functools.cached_property
    def _recorder(self) -> DriverGraphs:
        return DriverGraphs()

    def _capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        return self._recorder.capture(stream, enqueue)

    def launch(self, graph: Any, stream: int) -> None:
        """Launch a CUDA graph."""
        self._recorder.launch(graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        """Destroy a CUDA graph."""
        self._recorder.destroy(graph)

    @contextlib.contextmanager
    def _translated(self, call: str) -> Iterator[None]:
        try:
            yield
        # pycuda has one error class per kind of failure, and Boost.Python adds its own.
        except Exception as exc:
            advice = "; use fewer contexts or an engine for fewer prompts"
            is_memory = isinstance(exc, self._driver.MemoryError)  # not the built-in MemoryError
            raise SessionError(
                f"CUDA: {call} failed: {first_line(exc)}{advice if is_memory else ''}"
            ) from exc
