"""Graphs on TensorRT and TensorRT-RTX: one module, as their Python API is one."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tap_deploy import graphs
from tap_deploy.errors import SessionError
from tap_deploy.graphs import GraphSpec
from tap_deploy.sessions.buffers import Buffers, StagedTensor
from tap_deploy.sessions.contract import Session, Tensors, check_graph, resolve_shape
from tap_deploy.sessions.device_graph import DeviceExecutor, DeviceGraph, axis_bounds, size_bytes
from tap_deploy.sessions.device_memory import DeviceMemory
from tap_deploy.sessions.runtime_cache import RuntimeCacheFile
from tap_deploy.sessions.tensorrt_versions import ContextFactory

PROFILE = 0  # tap-export build makes one
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "INT8": "int8",
    "BOOL": "bool",
}


class TensorRtEngine(DeviceGraph):
    """A deserialised engine. Its plan must have been confirmed by ``plans.load_plan``."""

    can_capture = True

    def __init__(
        self,
        trt: Any,
        plan: bytes,
        spec: GraphSpec,
        *,
        cache_file: RuntimeCacheFile | None = None,
        host_code: bool = False,
    ) -> None:
        """Deserialise a plan; CUDA must be activated.

        Args:
            trt: the module, ``tensorrt`` or ``tensorrt_rtx``.
            plan: the bytes of the plan.
            spec: what the engine must look like.
            cache_file: where TensorRT-RTX keeps what it compiles; None for TensorRT.
            host_code: run code of the plan on the CPU, as version-compatible plans need.

        Raises:
            SessionError: TensorRT refuses the plan, or the engine is not the graph of ``spec``.
        """
        self.spec = spec
        self._log = _error_log(trt)
        self._runtime = trt.Runtime(self._log)
        if host_code:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self.error("cannot deserialise the plan; build it again with: tap-export build")
        self._check_engine(trt)
        self.minima, self.limits = axis_bounds(spec, self._profile_shapes())
        self.scratch_bytes = int(self._engine.device_memory_size_v2)
        self.contexts = ContextFactory(trt, self._engine, cache_file)
        self._executors: list[TensorRtExecutor] = []

    def executor(self, stream: int, scratch_address: int) -> TensorRtExecutor:
        """Return a new execution context for a stream."""
        context = self.contexts.create()
        if context is None:
            raise self.error("cannot create an execution context")
        context.set_device_memory(scratch_address, self.scratch_bytes)
        executor = TensorRtExecutor(self, context, stream)
        self._executors.append(executor)
        return executor

    def close(self) -> None:
        """Free the contexts, then the engine, then the runtime: each needs the next."""
        for executor in self._executors:
            executor.close()
        self._executors.clear()
        self.contexts.close()
        self._engine = None
        self._runtime = None

    def error(self, message: str) -> SessionError:
        """Return an error that names the graph and says what TensorRT logged."""
        logged = self._log.take()
        return SessionError(f"graph {self.spec.name}: TensorRT {message}{logged}")

    def _check_engine(self, trt: Any) -> None:
        engine, found = self._engine, {"inputs": {}, "outputs": {}}  # type: ignore[var-annotated]
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            dtype = engine.get_tensor_dtype(name).name
            shape = [None if size < 0 else int(size) for size in engine.get_tensor_shape(name)]
            found["inputs" if is_input else "outputs"][name] = (DTYPES.get(dtype, dtype), shape)
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise self.error(f"wants {name} in host memory; build it with: tap-export build")
        check_graph(self.spec, found["inputs"], found["outputs"])

    def _profile_shapes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        shapes = {}
        for tensor in self.spec.inputs:
            low, _, high = self._engine.get_tensor_profile_shape(tensor.name, PROFILE)
            shapes[tensor.name] = (tuple(low), tuple(high))
        return shapes


class TensorRtExecutor(DeviceExecutor):
    """One execution context; what did not change is not set again."""

    def __init__(self, engine: TensorRtEngine, context: Any, stream: int) -> None:
        self._graph, self._context, self._stream = engine, context, stream
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_sizes(self, sizes: Mapping[str, int]) -> None:
        """Set the shapes of the inputs that have dynamic axes."""
        for tensor in self._graph.spec.inputs:
            shape = resolve_shape(tensor, sizes) if tensor.dynamic_axes else None
            if shape is not None and self._shapes.get(tensor.name) != shape:
                self._shapes.pop(tensor.name, None)
                if not self._context.set_input_shape(tensor.name, shape):
                    raise self._graph.error(f"does not take {tensor.name} as {list(shape)}")
                self._shapes[tensor.name] = shape

    def bind(self, name: str, address: int) -> None:
        """Set the address of a tensor."""
        if self._addresses.get(name) != address:
            self._addresses.pop(name, None)
            if not self._context.set_tensor_address(name, address):
                raise self._graph.error(f"does not take an address for {name}")
            self._addresses[name] = address

    def enqueue(self) -> None:
        """Put one run into the stream."""
        if not self._context.execute_async_v3(self._stream):
            raise self._graph.error("failed to run")

    def can_capture(self) -> bool:
        """Whether the next run can be recorded."""
        return self._graph.contexts.can_capture(self._context, self._stream)

    def close(self) -> None:
        """Let go of the context."""
        self._context = None


class TensorRtSession(Session):
    """An engine behind the contract of host arrays: for verification, graph by graph.

    It copies all inputs in and all outputs out; a predictor runs on ``DevicePipeline`` instead.
    Calls are made one at a time.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        load: Callable[[], DeviceGraph],
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """Load an engine and allocate for the largest sizes that it takes."""
        self._memory, self._on_close = memory, on_close
        self._lock = threading.Lock()
        self._buffers = Buffers(memory)
        self._graph: DeviceGraph | None = None
        with memory.activated():
            try:
                self._graph = load()
                super().__init__(self._graph.spec)
                self._stream = self._buffers.stream()
                scratch = self._buffers.device(self._graph.scratch_bytes)
                self._executor = self._graph.executor(self._stream, scratch)
                self._tensors = self._allocated(self._graph)
            except BaseException:
                self._free()
                raise

    def _allocated(self, graph: DeviceGraph) -> dict[str, StagedTensor]:
        tensors = {}
        for spec in (*graph.spec.inputs, *graph.spec.outputs):
            itemsize = np.dtype(spec.dtype).itemsize
            tensors[spec.name] = self._buffers.staged(size_bytes(spec, graph.limits, itemsize))
            self._executor.bind(spec.name, tensors[spec.name].address)
        return tensors

    def _run(self, inputs: Tensors, outputs: Tensors) -> None:
        with self._lock, self._memory.activated():
            if self._graph is None:
                raise self._error("the session is closed; load it again")
            for part in self._parts(self._graph, inputs):
                taken = {name: array[part] for name, array in inputs.items()}
                self._run_part(self._graph, taken, {n: a[part] for n, a in outputs.items()})

    def _parts(self, graph: DeviceGraph, inputs: Tensors) -> list[slice]:
        """Pictures are independent, and engines take few at once: split them."""
        most = graph.limits.get("B")
        if most is None:
            return [slice(None)]
        pictures = len(inputs[graphs.IMAGES])
        return [slice(start, start + most) for start in range(0, pictures, most)]

    def _run_part(self, graph: DeviceGraph, inputs: Tensors, outputs: Tensors) -> None:
        sizes = _sizes(self.spec, inputs)
        graph.check_sizes(sizes)
        for spec in self.spec.inputs:
            array = inputs[spec.name]
            if spec.name == graphs.PAST_KEY_VALUES:
                # More slots than were filled: they are masked, but must be finite.
                sizes["T"] = max(sizes["T"], graph.minima["T"])
                array = _padded(array, sizes["T"])
            self._tensors[spec.name].upload(array, self._stream)
        try:
            self._executor.set_sizes(sizes)
            self._executor.enqueue()
            fetched = {
                name: self._tensors[name].download(array.shape, array.dtype.name, self._stream)
                for name, array in outputs.items()
            }
        finally:  # also after a failure: the next call writes into the same buffers
            self._memory.synchronize(self._stream)
        for name, array in outputs.items():
            np.copyto(array, fetched[name])

    def close(self) -> None:
        """Free engine and buffers."""
        with self._lock, self._memory.activated():
            self._free()

    def _free(self) -> None:
        if self._graph is not None:
            self._graph.close()
        self._graph = None
        self._buffers.close()
        if self._on_close is not None:
            self._on_close()
            self._on_close = None


def _sizes(spec: GraphSpec, inputs: Tensors) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        sizes |= {a: inputs[tensor.name].shape[i] for i, a in tensor.dynamic_axes.items()}
    return sizes


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    padding = np.zeros((length - len(array), *array.shape[1:]), array.dtype)
    return np.concatenate([array, padding]) if len(padding) else array


def _error_log(trt: Any) -> Any:
    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        """Keeps the last errors, so that they can be part of ours; the rest is noise."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: collections.deque[str] = collections.deque(maxlen=4)

        def log(self, severity: Any, msg: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self._errors.append(msg.strip())

        def take(self) -> str:
            errors = list(self._errors)
            self._errors.clear()
            return f": {'; '.join(errors)}" if errors else ""

    return ErrorLog()
