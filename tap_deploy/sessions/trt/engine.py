"""``DeviceGraph`` on TensorRT and TensorRT-RTX, which share one Python API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tap_deploy.errors import SessionError
from tap_deploy.graphs import TEXT_DECODER, GraphSpec
from tap_deploy.sessions.contract import check_graph, resolve_shape
from tap_deploy.sessions.gpu.graph import DeviceExecutor, DeviceGraph, axis_bounds
from tap_deploy.sessions.trt.log import error_log
from tap_deploy.sessions.trt.runtime_cache import RuntimeCacheFile
from tap_deploy.sessions.trt.versions import ContextFactory

PROFILE = 0  # engines of tap-export build have one profile
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
    """A deserialised engine; the plan must come from ``plans.load_plan``, which verifies it."""

    can_record = True

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
            plan: serialized engine.
            spec: expected inputs and outputs.
            cache_file: cache of the kernels that TensorRT-RTX compiles; None for TensorRT.
            host_code: allow host code of the plan, which version-compatible plans contain.

        Raises:
            SessionError: TensorRT rejects the plan, or the engine does not match ``spec``.
        """
        self.spec = spec
        self._log = error_log(trt)
        self._log.take()  # discards earlier errors, which are not about this engine
        self._runtime = self._started(trt)
        if host_code:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self.error("cannot deserialise the plan; build it again with: tap-export build")
        self._check_engine(trt)
        self.minima, self.limits = axis_bounds(spec, self._profile_shapes())
        self.scratch_bytes = int(self._engine.device_memory_size_v2)
        recorded = spec.name == TEXT_DECODER
        self.contexts = ContextFactory(trt, self._engine, cache_file, recorded=recorded)
        self._executors: list[TensorRtExecutor] = []

    def executor(self, stream: int, scratch_address: int) -> TensorRtExecutor:
        """Create an execution context for a stream."""
        context = self.contexts.create()
        if context is None:
            raise self.error("cannot create an execution context")
        context.set_device_memory(scratch_address, self.scratch_bytes)
        executor = TensorRtExecutor(self, context, stream)
        self._executors.append(executor)
        return executor

    def close(self) -> None:
        """Free contexts, engine and runtime, in this order because each needs the next."""
        for executor in self._executors:
            executor.close()
        self._executors.clear()
        self.contexts.close()
        self._engine = None
        self._runtime = None

    def error(self, message: str) -> SessionError:
        """Return an error with the graph's name and the errors that TensorRT logged."""
        logged = self._log.take()
        reason = f": {logged}" if logged else ""
        return SessionError(f"graph {self.spec.name}: TensorRT {message}{reason}")

    def _started(self, trt: Any) -> Any:
        try:
            return trt.Runtime(self._log)
        except TypeError as exc:  # the binding got a null pointer, e.g. with too old a driver
            raise self.error("does not start here, see: tap-export doctor --for tensorrt") from exc

    def _check_engine(self, trt: Any) -> None:
        engine = self._engine
        inputs: dict[str, tuple[str, list[int | None]]] = {}
        outputs: dict[str, tuple[str, list[int | None]]] = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            dtype = engine.get_tensor_dtype(name).name
            shape = [None if size < 0 else int(size) for size in engine.get_tensor_shape(name)]
            (inputs if is_input else outputs)[name] = (DTYPES.get(dtype, dtype), shape)
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise self.error(f"wants {name} in host memory; build it with: tap-export build")
        check_graph(self.spec, inputs, outputs)

    def _profile_shapes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        shapes = {}
        for tensor in self.spec.inputs:
            low, _, high = self._engine.get_tensor_profile_shape(tensor.name, PROFILE)
            shapes[tensor.name] = (tuple(low), tuple(high))
        return shapes


class TensorRtExecutor(DeviceExecutor):
    """An execution context that only sets changed shapes and addresses."""

    def __init__(self, engine: TensorRtEngine, context: Any, stream: int) -> None:
        self._graph, self._context, self._stream = engine, context, stream
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_sizes(self, sizes: Mapping[str, int]) -> None:
        """Set the shapes of inputs with dynamic axes."""
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
        """Enqueue one run in the stream."""
        if not self._context.execute_async_v3(self._stream):
            raise self._graph.error("failed to run")

    def can_record(self) -> bool:
        """Whether the next run can be recorded."""
        return self._graph.contexts.can_capture(self._context, self._stream)

    def close(self) -> None:
        """Drop the context."""
        self._context = None
