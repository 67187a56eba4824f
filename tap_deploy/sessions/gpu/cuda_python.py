"""``DeviceMemory`` on NVIDIA's binding, cuda-python."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tap_deploy.errors import SessionError, first_line
from tap_deploy.optional_modules import load_module
from tap_deploy.sessions.gpu.memory import DeviceMemory, PinnedBlock


def _import_runtime() -> Any:
    try:
        return load_module("cuda.bindings.runtime")
    except ModuleNotFoundError:  # the location before 12.6
        return load_module("cuda.cudart")


class CudaPythonMemory(DeviceMemory):
    """``DeviceMemory`` on ``cuda.bindings.runtime``, or on the older ``cuda.cudart``.

    The runtime API uses the primary context, like TensorRT and torch.
    """

    name = "cuda-python"

    def __init__(self, device_index: int = 0) -> None:
        self._cuda = _import_runtime()  # ImportError if not installed
        self.device_index = device_index
        count = self._call("cudaGetDeviceCount")
        if device_index >= count:
            raise SessionError(f"there is no GPU {device_index}; this machine has {count}")

    @contextlib.contextmanager
    def activated(self) -> Iterator[None]:
        """Select the GPU in this thread, and restore the previous one afterwards."""
        before = self._call("cudaGetDevice")
        self._call("cudaSetDevice", self.device_index)
        try:
            yield
        finally:
            if before != self.device_index:
                self._call("cudaSetDevice", before)

    @property
    def compute_capability(self) -> str:
        """Compute capability, such as ``8.7``."""
        attributes = self._cuda.cudaDeviceAttr
        major, minor = (
            self._call("cudaDeviceGetAttribute", attribute, self.device_index)
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        )
        return f"{major}.{minor}"

    def alloc(self, size_bytes: int) -> int:
        """Allocate device memory and return its address."""
        return int(self._call("cudaMalloc", size_bytes))

    def free(self, address: int) -> None:
        """Free device memory."""
        self._call("cudaFree", address)

    def alloc_pinned(self, size_bytes: int, *, mapped: bool = False) -> PinnedBlock:
        """Allocate page-locked host memory."""
        cuda = self._cuda
        flags = cuda.cudaHostAllocMapped if mapped else cuda.cudaHostAllocDefault
        address = int(self._call("cudaHostAlloc", size_bytes, int(flags)))
        array = np.frombuffer(memoryview(_bytes_at(address, size_bytes)), np.uint8)
        if not mapped:
            return PinnedBlock(array)
        return PinnedBlock(array, int(self._call("cudaHostGetDevicePointer", address, 0)))

    def free_pinned(self, block: PinnedBlock) -> None:
        """Free page-locked host memory."""
        self._call("cudaFreeHost", block.array.ctypes.data)

    def copy_to_device(self, address: int, array: np.ndarray, stream: int) -> None:
        """Copy a host array to a device address."""
        self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice", stream)

    def copy_to_host(self, array: np.ndarray, address: int, stream: int) -> None:
        """Copy from a device address to a host array."""
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost", stream)

    def copy_on_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Copy between two device addresses."""
        self._copy(target, source, size_bytes, "cudaMemcpyDeviceToDevice", stream)

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
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call(
            "cudaMemcpy2DAsync",
            target,
            target_pitch,
            source,
            source_pitch,
            row_bytes,
            rows,
            kind,
            stream,
        )

    def _copy(self, target: int, source: int, size_bytes: int, kind: str, stream: int) -> None:
        kind = getattr(self._cuda.cudaMemcpyKind, kind)
        self._call("cudaMemcpyAsync", target, source, size_bytes, kind, stream)

    def clear(self, address: int, size_bytes: int, stream: int) -> None:
        """Fill with zero bytes."""
        self._call("cudaMemsetAsync", address, 0, size_bytes, stream)

    def create_stream(self) -> int:
        """Create a stream and return its handle."""
        flags = int(self._cuda.cudaStreamNonBlocking)
        return int(self._call("cudaStreamCreateWithFlags", flags))

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait for a stream."""
        self._call("cudaStreamSynchronize", stream)

    def record_event(self, stream: int) -> Any:
        """Record a new event."""
        event = self._call("cudaEventCreate")
        self._call("cudaEventRecord", event, stream)
        return event

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Return the time between two events, ms."""
        try:
            return float(self._call("cudaEventElapsedTime", start, end))
        finally:
            for event in (start, end):
                self._call("cudaEventDestroy", event)

    def _capture(self, stream: int, enqueue: Callable[[], None]) -> Any:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            enqueue()
        except BaseException:
            # Leave capture mode; CUDA reports the invalid capture again, which is not news.
            with contextlib.suppress(SessionError):
                self._call("cudaGraphDestroy", self._call("cudaStreamEndCapture", stream))
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiateWithFlags", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: int) -> None:
        """Launch a CUDA graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        """Destroy a CUDA graph."""
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the runtime API and return its result, or None if it has none."""
        try:
            error, *results = getattr(self._cuda, function)(*arguments)
        # The binding raises for a missing driver library or a wrong argument.
        except Exception as exc:
            raise SessionError(f"CUDA: {function} failed: {first_line(exc)}") from exc
        if int(error):
            self._cuda.cudaGetLastError()  # clears the error, which later calls would report again
            raise SessionError(f"CUDA: {function} failed: {self._described(error)}")
        return results[0] if results else None

    def _described(self, error: Any) -> str:
        texts = []
        for describe in (self._cuda.cudaGetErrorName, self._cuda.cudaGetErrorString):
            text = describe(error)[1]
            texts.append(text.decode() if isinstance(text, bytes) else str(text))
        advice = "; use fewer contexts or an engine for fewer prompts"
        return f"{texts[0]} ({texts[1]})" + (advice if "MemoryAllocation" in texts[0] else "")


def _bytes_at(address: int, size_bytes: int) -> Any:
    return (ctypes.c_uint8 * size_bytes).from_address(address)
