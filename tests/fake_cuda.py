"""A fake GPU that computes: an address space, lazy streams, graphs with fixed addresses.

What a test can rely on:

- Memory is new allocations of 0xFF bytes (NaN as float16 and as float32), with gaps between them.
  Any access is held against the live allocations: out of bounds and after ``free`` raise.
- **Streams do nothing until they are synchronized.** A result that is read too early is an old
  one, a host buffer that is written again too early sends the new content, and work of another
  stream that was not waited for has not happened.
- Host memory of asynchronous copies must be pinned.
- A recorded graph holds the very operations, with the addresses that they had.
- Allocating, freeing or waiting while a stream of the thread is recorded spoils the recording.
- ``fail("cudaMalloc", after=2)`` makes the third call from now fail with an error code.

``copies`` lists every copy as (kind, bytes, device address), ``allocations`` every allocation.
``install_cuda_python`` and ``install_pycuda`` put a package in front of it; the names and the
shapes of their functions are those of cuda-python 12.9 and pycuda 2025.1 to 2026.1, which has no
CUDA graphs: with it comes the driver's own library, called as C functions are.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import enum
import importlib.abc
import importlib.machinery
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

ALIGNMENT = 256
Operation = Callable[[], None]


class CudaError(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class CudaFault(Exception):
    """Error of a call of the fake; the installed packages translate it into their own."""

    def __init__(self, code: CudaError, detail: str = "") -> None:
        super().__init__(f"{code.name} {detail}")
        self.code = code


@dataclasses.dataclass
class Stream:
    handle: int
    pending: list[Operation] = dataclasses.field(default_factory=list)
    recording: list[Operation] | None = None
    recording_thread: int = 0
    mode: int = 0
    spoilt: bool = False


class FakeCuda:
    def __init__(self, memory_bytes: int = 1 << 32, devices: int = 1) -> None:
        self.compute_capability = (8, 9)
        self.lock = threading.RLock()
        self.devices, self.memory_bytes = devices, memory_bytes
        self.device_blocks: dict[int, np.ndarray] = {}
        self.pinned_blocks: dict[int, np.ndarray] = {}
        self.mapped: dict[int, int] = {}  # host address -> device address
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, list[Operation]] = {}
        self.events: dict[int, int | None] = {}  # handle -> when the stream passed it
        self.ticks = 0
        self.allocations: list[tuple[str, int]] = []
        self.copies: list[tuple[str, int, int]] = []
        self.synchronizations = self.launches = 0
        self._next = 0x7F00_0000_0000
        self.last_error = CudaError.cudaSuccess  # what cudaGetLastError reports
        self.aborts: list[str] = []  # where pycuda would have aborted the process
        self._failures: dict[str, tuple[int, int, CudaError]] = {}

    # What tests ask.

    def fail(
        self,
        function: str,
        after: int = 0,
        code: CudaError = CudaError.cudaErrorLaunchFailure,
        times: int = 1,
    ) -> None:
        self._failures[function] = (after, times, code)

    def reset_counts(self) -> None:
        self.allocations.clear()
        self.copies.clear()
        self.synchronizations = self.launches = 0

    def copied_bytes(self, kind: str) -> int:
        return sum(size for found, size, _ in self.copies if found == kind)

    def leaks(self) -> dict[str, int]:
        held = {
            "device": len(self.device_blocks),
            "pinned": len(self.pinned_blocks),
            "streams": len(self.streams),
            "graphs": len(self.graphs),
            "events": len(self.events),
        }
        return {name: count for name, count in held.items() if count}

    # What the packages in front and the engines call.

    @contextlib.contextmanager
    def called(self, function: str) -> Iterator[None]:
        with self.lock:
            if function in self._failures:
                left, times, code = self._failures[function]
                if left == 0:
                    if times == 1:
                        del self._failures[function]
                    else:
                        self._failures[function] = (0, times - 1, code)
                    raise CudaFault(code, "injected")
                self._failures[function] = (left - 1, times, code)
            yield

    def require(self, condition: bool, detail: str) -> None:
        if not condition:
            raise CudaFault(CudaError.cudaErrorInvalidValue, detail)

    def _address(self, size: int) -> int:
        address = self._next
        # A gap, so that running over the end of one block never lands in the next.
        self._next += -(-size // ALIGNMENT) * ALIGNMENT + 16 * ALIGNMENT
        return address

    def malloc(self, size: int) -> int:
        self._forbid_while_recording("malloc")
        self.require(size > 0, "empty allocation")
        used = sum(block.nbytes for block in self.device_blocks.values())
        if used + size > self.memory_bytes:
            raise CudaFault(CudaError.cudaErrorMemoryAllocation)
        address = self._address(size)
        self.device_blocks[address] = np.full(size, 0xFF, np.uint8)
        self.allocations.append(("device", size))
        return address

    def free(self, address: int) -> None:
        self._forbid_while_recording("free")
        self.require(address in self.device_blocks, "free of what was not allocated")
        self._finish_everything()  # as cudaFree does
        del self.device_blocks[address]

    def host_alloc(self, size: int, mapped: bool) -> np.ndarray:
        self._forbid_while_recording("host_alloc")
        block = np.full(size, 0xFF, np.uint8)
        address = block.ctypes.data
        self.pinned_blocks[address] = block
        self.allocations.append(("pinned", size))
        if mapped:
            self.mapped[address] = self._address(size)
            self.device_blocks[self.mapped[address]] = block
        return block

    def free_host(self, address: int) -> None:
        self._forbid_while_recording("free_host")
        self.require(address in self.pinned_blocks, "free of what was not pinned")
        self._finish_everything()
        del self.pinned_blocks[address]
        if address in self.mapped:
            del self.device_blocks[self.mapped.pop(address)]

    def device_view(self, address: int, size: int) -> np.ndarray:
        return self._view(self.device_blocks, address, size)

    def host_view(self, address: int, size: int) -> np.ndarray:
        return self._view(self.pinned_blocks, address, size)

    def _view(self, blocks: dict[int, np.ndarray], address: int, size: int) -> np.ndarray:
        for start, block in blocks.items():
            if start <= address < start + block.nbytes:
                if address + size > start + block.nbytes:
                    break
                return block[address - start : address - start + size]
        raise CudaFault(CudaError.cudaErrorIllegalAddress, f"{size} bytes at {address:#x}")

    def create_stream(self) -> int:
        stream = Stream(handle=0x5000 + 16 * len(self.allocations) + self._address(1) % 65536 + 1)
        self.streams[stream.handle] = stream
        return stream.handle

    def stream(self, handle: int) -> Stream:
        self.require(handle in self.streams, f"no stream {handle}")
        return self.streams[handle]

    def destroy_stream(self, handle: int) -> None:
        self.run(self.stream(handle))
        del self.streams[handle]

    def enqueue(self, handle: int, operation: Operation) -> None:
        stream = self.stream(handle)
        (stream.pending if stream.recording is None else stream.recording).append(operation)

    def synchronize(self, handle: int) -> None:
        stream = self.stream(handle)
        if stream.recording is not None:
            stream.spoilt = True
            raise CudaFault(CudaError.cudaErrorStreamCaptureUnsupported, "synchronize")
        self.synchronizations += 1
        self.run(stream)

    def run(self, stream: Stream) -> None:
        pending, stream.pending = stream.pending, []
        for operation in pending:
            operation()

    def create_event(self) -> int:
        handle = self._address(1)
        self.events[handle] = None
        return handle

    def record_event(self, event: int, stream: int) -> None:
        def passed() -> None:
            self.ticks += 1
            self.events[event] = self.ticks

        self.require(event in self.events, "no such event")
        self.enqueue(stream, passed)

    def elapsed_ms(self, start: int, end: int) -> float:
        """Each event is 1 ms after the one before."""
        first, last = self.events[start], self.events[end]
        if first is None or last is None:
            raise CudaFault(CudaError.cudaErrorNotReady, "event not reached")
        return float(last - first)

    def destroy_event(self, event: int) -> None:
        self.require(event in self.events, "no such event")
        del self.events[event]

    def _finish_everything(self) -> None:
        for stream in self.streams.values():
            # What is bad in there is for whoever waits for that stream.
            with contextlib.suppress(CudaFault):
                self.run(stream)

    def copy(self, kind: str, target: int, source: int, size: int, stream: int) -> None:
        views = {
            "h2d": (self.device_view, self.host_view),
            "d2h": (self.host_view, self.device_view),
            "d2d": (self.device_view, self.device_view),
        }[kind]

        def move(real: bool) -> None:
            to, origin = views[0](target, size), views[1](source, size)
            if real:
                to[:] = origin

        move(real=False)  # bounds are known now
        device_address = source if kind == "d2h" else target
        self.copies.append((kind, size, device_address))
        self.enqueue(stream, lambda: move(real=True))

    def copy_rows(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        rows: int,
        stream: int,
    ) -> None:
        self.require(width <= min(target_pitch, source_pitch), "rows overlap")

        def move(real: bool) -> None:
            for row in range(rows):
                to = self.device_view(target + row * target_pitch, width)
                origin = self.device_view(source + row * source_pitch, width)
                if real:
                    to[:] = origin

        move(real=False)  # bounds are known now
        self.copies.append(("d2d", width * rows, target))
        self.enqueue(stream, lambda: move(real=True))

    def memset(self, address: int, value: int, size: int, stream: int) -> None:
        self.device_view(address, size)

        def fill() -> None:
            self.device_view(address, size)[:] = value

        self.enqueue(stream, fill)

    def begin_capture(self, handle: int, mode: int) -> None:
        stream = self.stream(handle)
        self.require(stream.recording is None, "already recording")
        stream.recording, stream.spoilt, stream.mode = [], False, mode
        stream.recording_thread = threading.get_ident()

    def end_capture(self, handle: int) -> int:
        stream = self.stream(handle)
        self.require(stream.recording is not None, "not recording")
        # It is over, whether that goes well or not.
        operations, stream.recording = stream.recording, None
        with self.called("end_capture"):
            pass
        if stream.spoilt:
            raise CudaFault(CudaError.cudaErrorStreamCaptureInvalidated)
        graph = self._address(1)
        assert operations is not None
        self.graphs[graph] = operations
        return graph

    def instantiate(self, graph: int) -> int:
        self.require(graph in self.graphs, "no graph")
        executable = self._address(1)
        self.graphs[executable] = list(self.graphs[graph])
        return executable

    def launch(self, graph: int, stream: int) -> None:
        self.require(graph in self.graphs, "launch of a destroyed graph")
        self.launches += 1
        for operation in self.graphs[graph]:
            self.enqueue(stream, operation)

    def destroy_graph(self, graph: int) -> None:
        self.require(graph in self.graphs, "graph destroyed twice")
        del self.graphs[graph]

    def _forbid_while_recording(self, what: str) -> None:
        for stream in self.streams.values():
            everybody = stream.mode == CaptureMode.cudaStreamCaptureModeGlobal
            mine = stream.recording_thread == threading.get_ident()
            if stream.recording is not None and (everybody or mine):
                stream.spoilt = True
                raise CudaFault(CudaError.cudaErrorStreamCaptureUnsupported, what)


class Handle:
    """cuda-python's wrapper of a pointer: an int on request."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __int__(self) -> int:
        return self._value


def install_cuda_python(monkeypatch: Any, cuda: FakeCuda, *, old: bool = False) -> None:
    """Make ``cuda.bindings.runtime`` (or the older ``cuda.cudart``) importable, and no pycuda."""
    runtime = _runtime_module(cuda, "cuda.cudart" if old else "cuda.bindings.runtime")
    _block(monkeypatch, "pycuda", "pycuda.driver", "pycuda.autoprimaryctx")
    package = types.ModuleType("cuda")
    package.__path__ = []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", package)
    if old:
        _block(monkeypatch, "cuda.bindings", "cuda.bindings.runtime")
        monkeypatch.setitem(sys.modules, "cuda.cudart", runtime)
        return
    _block(monkeypatch, "cuda.cudart")
    bindings = types.ModuleType("cuda.bindings")
    bindings.__path__ = []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)


def _block(monkeypatch: Any, *names: str) -> None:
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def block_cuda(monkeypatch: Any) -> None:
    """Make no CUDA package importable."""
    _block(monkeypatch, "pycuda", "pycuda.driver", "pycuda.autoprimaryctx")
    _block(monkeypatch, "cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart")


class MemcpyKind(enum.IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3
    cudaMemcpyDefault = 4


class CaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class DeviceAttr(enum.IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


def _runtime_module(cuda: FakeCuda, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    constants = {"cudaHostAllocDefault": 0, "cudaHostAllocMapped": 2, "cudaStreamNonBlocking": 1}
    enums = {
        "cudaError_t": CudaError,
        "cudaMemcpyKind": MemcpyKind,
        "cudaStreamCaptureMode": CaptureMode,
        "cudaDeviceAttr": DeviceAttr,
    }
    kinds = {1: "h2d", 2: "d2h", 3: "d2d"}
    current = threading.local()

    def memcpy(target: Any, source: Any, size: int, kind: MemcpyKind, stream: Any) -> None:
        assert isinstance(kind, MemcpyKind)
        cuda.copy(kinds[kind], int(target), int(source), size, int(stream))

    def memcpy_2d(
        target: Any,
        target_pitch: int,
        source: Any,
        source_pitch: int,
        width: int,
        rows: int,
        kind: MemcpyKind,
        stream: Any,
    ) -> None:
        assert kind is MemcpyKind.cudaMemcpyDeviceToDevice
        pitches = target_pitch, source_pitch
        cuda.copy_rows(int(target), pitches[0], int(source), pitches[1], width, rows, int(stream))

    def begin(stream: Any, mode: CaptureMode) -> None:
        assert isinstance(mode, CaptureMode)
        cuda.begin_capture(int(stream), mode)

    def last_error() -> None:
        cuda.last_error = CudaError.cudaSuccess

    def host_alloc(size: int, flags: int) -> int:
        return int(cuda.host_alloc(size, mapped=bool(flags & 2)).ctypes.data)

    def set_device(index: int) -> None:
        if index >= cuda.devices:
            raise CudaFault(CudaError.cudaErrorInvalidDevice)
        current.index = index

    functions: dict[str, Callable[..., Any]] = {
        "cudaGetDeviceCount": lambda: cuda.devices,
        "cudaGetDevice": lambda: getattr(current, "index", 0),
        "cudaSetDevice": set_device,
        "cudaDeviceGetAttribute": lambda attr, device: cuda.compute_capability[attr - 75],
        "cudaMalloc": cuda.malloc,
        "cudaFree": cuda.free,
        "cudaHostAlloc": host_alloc,
        "cudaFreeHost": cuda.free_host,
        "cudaHostGetDevicePointer": lambda host, flags: cuda.mapped[host],
        "cudaMemcpyAsync": memcpy,
        "cudaMemcpy2DAsync": memcpy_2d,
        "cudaMemsetAsync": lambda a, value, size, s: cuda.memset(a, value, size, int(s)),
        "cudaStreamCreateWithFlags": lambda flags: Handle(cuda.create_stream()),
        "cudaStreamDestroy": lambda stream: cuda.destroy_stream(int(stream)),
        "cudaStreamSynchronize": lambda stream: cuda.synchronize(int(stream)),
        "cudaEventCreate": lambda: Handle(cuda.create_event()),
        "cudaEventRecord": lambda event, stream: cuda.record_event(int(event), int(stream)),
        "cudaEventElapsedTime": lambda start, end: cuda.elapsed_ms(int(start), int(end)),
        "cudaEventDestroy": lambda event: cuda.destroy_event(int(event)),
        "cudaStreamBeginCapture": begin,
        "cudaStreamEndCapture": lambda stream: Handle(cuda.end_capture(int(stream))),
        "cudaGraphInstantiateWithFlags": lambda g, flags: Handle(cuda.instantiate(int(g))),
        "cudaGraphDestroy": lambda graph: cuda.destroy_graph(int(graph)),
        "cudaGraphLaunch": lambda graph, stream: cuda.launch(int(graph), int(stream)),
        "cudaGraphExecDestroy": lambda graph: cuda.destroy_graph(int(graph)),
        "cudaGetLastError": last_error,
    }

    def returning_codes(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            try:
                with cuda.called(name):
                    result = function(*arguments)
            except CudaFault as fault:
                cuda.last_error = fault.code
                return (fault.code, None)
            return (CudaError.cudaSuccess,) if result is None else (CudaError.cudaSuccess, result)

        return call

    for function_name, function in functions.items():
        setattr(module, function_name, returning_codes(function_name, function))
    module.cudaGetErrorName = lambda e: (CudaError.cudaSuccess, e.name.encode())  # type: ignore[attr-defined]
    module.cudaGetErrorString = lambda e: (CudaError.cudaSuccess, b"said the fake")  # type: ignore[attr-defined]
    for key, value in {**constants, **enums}.items():
        setattr(module, key, value)
    return module


class PycudaError(Exception): ...


class PycudaMemoryError(PycudaError): ...


class ContextStack(list[Any]):
    """pycuda's stack of one thread: not empty when the thread ends, it aborts the process."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __del__(self) -> None:
        if self:
            self._cuda.aborts.append("the context stack was not empty")


class AutoPrimaryContext(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """``pycuda.autoprimaryctx``: its import pushes the context on the stack of the thread."""

    name = "pycuda.autoprimaryctx"

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name == self.name else None

    def create_module(self, spec: Any) -> None: ...

    def exec_module(self, module: Any) -> None:
        module.context = self._driver.Device(0).retain_primary_context()
        module.context.push()


def install_pycuda(monkeypatch: Any, cuda: FakeCuda, *, library: bool = True) -> Any:
    """Make ``pycuda.driver`` and ``pycuda.autoprimaryctx`` importable, and no cuda-python.

    A thread in which no context was pushed can do nothing. Without ``library`` the driver's
    library is not found by its name. Returns the module ``pycuda.driver``.
    """
    block_cuda(monkeypatch)
    driver = types.ModuleType("pycuda.driver")
    local = threading.local()

    def stack() -> ContextStack:
        if not hasattr(local, "stack"):
            local.stack = ContextStack(cuda)
        found: ContextStack = local.stack
        return found

    @contextlib.contextmanager
    def call(name: str) -> Iterator[None]:
        try:
            with cuda.called(name):
                if not stack():
                    raise PycudaError("invalid device context")
                yield
        except CudaFault as fault:
            is_memory = fault.code == CudaError.cudaErrorMemoryAllocation
            raise (PycudaMemoryError if is_memory else PycudaError)(str(fault)) from fault

    class Device:
        def __init__(self, index: int) -> None:
            if index >= cuda.devices:
                raise PycudaError("cuDeviceGet failed: invalid device ordinal")
            self.index = index

        def compute_capability(self) -> tuple[int, int]:
            return cuda.compute_capability

        def retain_primary_context(self) -> Any:
            return Context(self)

    class Context:
        def __init__(self, device: Device) -> None:
            self.device, self.thread = device, threading.get_ident()

        def push(self) -> None:
            stack().append(self)

        @staticmethod
        def pop() -> None:
            stack().pop()

        @staticmethod
        def get_device() -> Device:
            with call("get_device"):
                found: Device = stack()[-1].device
                return found

    class Owned:
        """An object that belongs to the context in which it was made."""

        def __init__(self) -> None:
            self.context = stack()[-1]

        def check_context(self) -> None:
            foreign = not stack() or stack()[-1] is not self.context
            if foreign and self.context.thread != threading.get_ident():
                raise PycudaError("cannot activate out-of-thread context")

    class DeviceAllocation(Owned):
        def __init__(self, size: int) -> None:
            with call("mem_alloc"):
                super().__init__()
                self.address = cuda.malloc(size)

        def __int__(self) -> int:
            return self.address

        def free(self) -> None:
            self.check_context()
            with call("free"):
                cuda.free(self.address)

    class PagelockedHostAllocation(Owned):
        def __init__(self, address: int) -> None:
            super().__init__()
            self.address = address

        def get_device_pointer(self) -> int:
            return cuda.mapped[self.address]

        def free(self) -> None:
            self.check_context()
            with call("free_host"):
                cuda.free_host(self.address)

    class PinnedArray(np.ndarray):
        base_allocation: Any = None

        @property
        def base(self) -> Any:
            return self.base_allocation if self.base_allocation is not None else super().base

    def pagelocked_empty(size: int, dtype: Any, order: str = "C", mem_flags: int = 0) -> Any:
        assert dtype is np.uint8
        with call("pagelocked_empty"):
            block = cuda.host_alloc(size, mapped=bool(mem_flags))
        array = block.view(PinnedArray)
        array.base_allocation = PagelockedHostAllocation(block.ctypes.data)
        return array

    class Stream:
        def __init__(self, flags: int = 0) -> None:
            with call("Stream"):
                self.handle = cuda.create_stream()

        def synchronize(self) -> None:
            with call("synchronize"):
                cuda.synchronize(self.handle)

        def __del__(self) -> None:
            if self.handle in cuda.streams:
                cuda.destroy_stream(self.handle)

    class Event:
        def __init__(self) -> None:
            with call("Event"):
                self.handle = cuda.create_event()

        def record(self, stream: Stream) -> None:
            with call("record"):
                cuda.record_event(self.handle, stream.handle)

        def time_since(self, other: Event) -> float:
            with call("time_since"):
                return cuda.elapsed_ms(other.handle, self.handle)

        def __del__(self) -> None:
            cuda.events.pop(self.handle, None)

    def htod(target: int, source: np.ndarray, stream: Any) -> None:
        with call("memcpy_htod_async"):
            cuda.copy("h2d", target, source.ctypes.data, source.nbytes, stream.handle)

    def dtoh(target: np.ndarray, source: int, stream: Any) -> None:
        with call("memcpy_dtoh_async"):
            cuda.copy("d2h", target.ctypes.data, source, target.nbytes, stream.handle)

    def dtod(target: int, source: int, size: int, stream: Any) -> None:
        with call("memcpy_dtod_async"):
            cuda.copy("d2d", target, source, size, stream.handle)

    class Memcpy2D:
        src_pitch = dst_pitch = width_in_bytes = height = 0

        def set_src_device(self, address: int) -> None:
            self.source = address

        def set_dst_device(self, address: int) -> None:
            self.target = address

        def __call__(self, stream: Any) -> None:
            with call("Memcpy2D"):
                cuda.copy_rows(
                    self.target,
                    self.dst_pitch,
                    self.source,
                    self.src_pitch,
                    self.width_in_bytes,
                    self.height,
                    stream.handle,
                )

    def memset(address: int, value: int, count: int, stream: Any) -> None:
        with call("memset_d8_async"):
            cuda.memset(address, value, count, stream.handle)

    values = {
        "init": lambda: None,
        "Device": Device,
        "Stream": Stream,
        "Event": Event,
        "mem_alloc": DeviceAllocation,
        "host_alloc_flags": types.SimpleNamespace(DEVICEMAP=2),
        "pagelocked_empty": pagelocked_empty,
        "memcpy_htod_async": htod,
        "memcpy_dtoh_async": dtoh,
        "memcpy_dtod_async": dtod,
        "Memcpy2D": Memcpy2D,
        "memset_d8_async": memset,
        "Error": PycudaError,
        "MemoryError": PycudaMemoryError,
    }
    for key, value in values.items():
        setattr(driver, key, value)
    package = types.ModuleType("pycuda")
    package.__path__ = []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    del sys.modules[AutoPrimaryContext.name]  # blocked above, which also undoes an import
    monkeypatch.setattr(sys, "meta_path", [AutoPrimaryContext(driver), *sys.meta_path])
    install_driver(monkeypatch, cuda, stack if library else None)
    return driver


class DriverFunction:
    """A C function, called as the program declared it, so that a wrong declaration fails."""

    argtypes: Any = None
    restype: Any = None

    def __init__(self, function: Callable[..., int]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> int:
        assert self.argtypes is not None and self.restype is ctypes.c_int
        prototype = ctypes.CFUNCTYPE(self.restype, *self.argtypes)
        code: int = prototype(self._function)(*arguments)
        return code


def install_driver(monkeypatch: Any, cuda: FakeCuda, stack: Callable[[], Any] | None) -> None:
    """Put the driver's library in the place of the real one; ``stack`` is a thread's contexts."""

    def begin(stream: int, mode: int) -> None:
        cuda.begin_capture(stream, mode)

    def end(stream: int, graph: Any) -> None:
        graph[0] = cuda.end_capture(stream)

    def instantiate(executable: Any, graph: int, flags: int) -> None:
        assert flags == 0
        executable[0] = cuda.instantiate(graph)

    names: list[ctypes.c_char_p] = []  # they must live on

    def error_name(code: int, text: Any) -> None:
        words = re.sub("([A-Z])", r"_\1", CudaError(code).name.removeprefix("cudaError")).upper()
        names.append(ctypes.c_char_p(f"CUDA_ERROR{words}".encode()))
        text[0] = names[-1]

    functions: dict[str, Callable[..., None]] = {
        "cuStreamBeginCapture_v2": begin,
        "cuStreamEndCapture": end,
        "cuGraphInstantiateWithFlags": instantiate,
        "cuGraphLaunch": cuda.launch,
        "cuGraphExecDestroy": cuda.destroy_graph,
        "cuGraphDestroy": cuda.destroy_graph,
        "cuGetErrorName": error_name,
    }

    def returning_codes(name: str, function: Callable[..., None]) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            try:
                with cuda.called(name):
                    cuda.require(name == "cuGetErrorName" or bool(stack and stack()), "no context")
                    function(*arguments)
            except CudaFault as fault:
                return int(fault.code)
            return 0

        return call

    def load() -> Any:
        if stack is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return types.SimpleNamespace(
            **{n: DriverFunction(returning_codes(n, f)) for n, f in functions.items()}
        )

    monkeypatch.setattr("tap_deploy.sessions.gpu.driver_graphs.load_driver", load)
