"""The strict fake of ``tensorrt``, run-time side: it deserialises the fake's plans and runs them.

``runtime_module("10.3", cuda)`` is ``strict_tensorrt.strict_module`` with a runtime that computes
with onnxruntime on the memory of a ``FakeCuda``. It is as strict as the real thing is said to be,
and a little stricter:

- A plan of another version or backend is refused, and so is one that was damaged.
- ``execute_async_v3`` returns False, with a line in the log, unless every input has a shape within
  the profile, every tensor has an address aligned to 256 bytes in a live allocation that is large
  enough, scratch memory was set, and the stream is not the default one.
- Shapes and addresses are those of the call; what lies there is read when the stream gets to it.
- Scratch memory is overwritten by every run.
- A run can be recorded only after one with the same shapes; a recorded run is void once its
  context took other shapes or was let go.
- TensorRT-RTX compiles on the first run of a shape, and cannot be recorded before, unless the
  runtime cache knows the shape. A plan built without ``REQUIRE_USER_ALLOCATION`` can never be.
- ``trt._faults`` lists what the real one does not report: fallback kernels that were recorded,
  and contexts that outlived their scratch memory or stream, or went before their recordings.
"""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import numpy as np

from tests.fake_cuda import ALIGNMENT, CudaError, CudaFault, FakeCuda
from tests.strict_tensorrt import IHostMemory, Strict, _Unconstructible, read_plan, strict_module

SCRATCH_BYTES = 3000  # not a multiple of anything
CACHE_MAGIC = b"STRICT-RUNTIME-CACHE "
_DTYPES = {"float32": "FLOAT", "float16": "HALF"}


class Runtime(Strict):
    def __init__(self, logger: Any) -> None:
        assert isinstance(logger, self._trt.ILogger)
        self._logger, self._host_code = logger, False

    def _set_host_code(self, value: bool) -> None:
        self._host_code = bool(value)

    engine_host_code_allowed = property(lambda self: self._host_code, _set_host_code)

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        trt = self._trt
        try:
            header, onnx_bytes = read_plan(bytes(serialized_engine))
        except ValueError as exc:
            return self._refuse(str(exc))
        if (header.fake, header.backend) != (trt._version, trt.__name__):
            return self._refuse(f"made by {header.backend} {header.fake}")
        import onnxruntime

        from tap_deploy.sessions.ort.session import EXACT_INT8, SLOW_ON_CPUS

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.add_session_config_entry(*EXACT_INT8)
        session = onnxruntime.InferenceSession(
            onnx_bytes,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=SLOW_ON_CPUS,
        )
        engine = trt.ICudaEngine._make(
            _runtime=self,
            _logger=self._logger,
            _header=header,
            _session=session,
            _contexts=weakref.WeakSet(),
            _compiled=set(),
        )
        trt._engines.add(engine)
        return engine

    def _refuse(self, reason: str) -> None:
        self._logger.log(self._trt.ILogger.ERROR, reason)


class ICudaEngine(_Unconstructible):
    num_io_tensors = property(lambda self: len(self._header.inputs) + len(self._header.outputs))
    num_optimization_profiles = property(lambda self: len(self._header.profiles))
    device_memory_size_v2 = property(lambda self: SCRATCH_BYTES)

    def get_tensor_name(self, index: int) -> str:
        return str([*self._header.inputs, *self._header.outputs][index]["name"])

    def _tensor(self, name: str) -> dict[str, Any]:
        tensors = [*self._header.inputs, *self._header.outputs]
        return next(tensor for tensor in tensors if tensor["name"] == name)

    def get_tensor_mode(self, name: str) -> Any:
        is_input = any(tensor["name"] == name for tensor in self._header.inputs)
        return self._trt.TensorIOMode.INPUT if is_input else self._trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        dtype = self._tensor(name)["dtype"]
        return getattr(self._trt.DataType, _DTYPES.get(dtype, dtype.upper()))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensor(name)["shape"])

    def get_tensor_location(self, name: str) -> Any:
        return self._trt.TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._header.profiles[profile_index][name]]

    def create_engine_inspector(self) -> Any:
        return self._trt.EngineInspector._make()

    def create_runtime_config(self) -> Any:
        lazy = self._trt.DynamicShapesKernelSpecializationStrategy.LAZY
        return self._trt.IRuntimeConfig._make(
            _engine=self, _strategy=None, _cache=None, _specialization=lazy
        )

    def create_execution_context(self, how: Any) -> Any:
        trt, cache, specialization = self._trt, None, None
        if not isinstance(how, trt.ExecutionContextAllocationStrategy):
            # A configuration: only where the version has it, which the name lookup decides.
            assert isinstance(how, trt.IRuntimeConfig)
            assert how._engine is self, "a configuration of another engine"
            how, cache, specialization = how._strategy, how._cache, how._specialization
        assert how == trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = trt.IExecutionContext._make(
            _engine=self,
            _cuda=trt._cuda,
            _cache=cache,
            _lazy=specialization is not None and specialization.name != "EAGER",
            _streams=set(),
            _recorded=[],
            _shapes={},
            _addresses={},
            _scratch=None,
            _epoch=0,
            _ran_epoch=-1,
        )
        self._contexts.add(context)
        return context


class EngineInspector(_Unconstructible):
    def get_engine_information(self, format: Any) -> str:
        assert isinstance(format, self._trt.LayerInformationFormat)
        return json.dumps({"Layers": []})


class IExecutionContext(_Unconstructible):
    def set_device_memory(self, memory: int, size: int) -> None:
        assert isinstance(memory, int) and size >= SCRATCH_BYTES
        assert memory % ALIGNMENT == 0
        self._cuda.device_view(memory, size)
        self._scratch = memory

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, 0)
        fits = len(shape) == len(low) and all(
            a <= s <= b for a, s, b in zip(low, shape, high, strict=True)
        )
        if not fits:
            return self._refuse(f"{name} {list(shape)} is outside of the profile {low} {high}")
        if self._shapes.get(name) != tuple(shape):
            self._shapes[name] = tuple(shape)
            self._epoch += 1
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert isinstance(memory, int)
        self._engine._tensor(name)
        if memory % ALIGNMENT:
            return self._refuse(f"address of {name} is not aligned to {ALIGNMENT} bytes")
        self._addresses[name] = memory
        return True

    def __del__(self) -> None:
        faults, cuda = self._trt._faults, self._cuda
        if self._scratch is not None and self._scratch not in cuda.device_blocks:
            faults.append("scratch memory was freed before its context")
        if any(stream not in cuda.streams for stream in self._streams):
            faults.append("a stream was destroyed before a context that ran in it")
        if any(recorded() is not None for recorded in self._recorded):
            faults.append("a context went before its recordings")

    def is_stream_capturable(self, stream: int) -> bool:
        if "REQUIRE_USER_ALLOCATION" not in self._engine._header.flags:
            return False
        return self._shape_key() in self._compiled_shapes()

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda: FakeCuda = self._cuda
        with cuda.lock:
            try:
                with cuda.called("execute_async_v3"):
                    return self._enqueue(cuda, stream_handle)
            except CudaFault as fault:
                return self._refuse(str(fault))

    def _enqueue(self, cuda: FakeCuda, handle: int) -> bool:
        if not handle:
            return self._refuse("the default stream")
        if self._scratch is None:
            return self._refuse("no device memory was set")
        stream = cuda.stream(handle)
        recording = stream.recording is not None
        if recording and self._ran_epoch != self._epoch:
            stream.spoilt = True
            return self._refuse("recorded before a run with these shapes")
        places, problem = self._places()
        if problem is not None:
            stream.spoilt = stream.spoilt or recording
            return self._refuse(problem)
        for address, _, nbytes in places.values():
            cuda.device_view(address, nbytes)
        scratch, context, epoch = self._scratch, weakref.ref(self), self._epoch
        session, outputs = self._engine._session, self._engine._header.outputs

        def compute() -> None:
            alive = context()
            if alive is None or (recording and alive._epoch != epoch):
                raise CudaFault(CudaError.cudaErrorLaunchFailure, "a void recording was replayed")
            cuda.device_view(scratch, SCRATCH_BYTES)[:] = 0xAA
            arrays = {
                name: cuda.device_view(address, nbytes).view(dtype).reshape(shape).copy()
                for name, (address, (shape, dtype), nbytes) in places.items()
                if name in {tensor["name"] for tensor in alive._engine._header.inputs}
            }
            results = session.run([tensor["name"] for tensor in outputs], arrays)
            for tensor, result in zip(outputs, results, strict=True):
                address, (shape, dtype), nbytes = places[tensor["name"]]
                assert result.shape == shape and result.dtype == dtype
                cuda.device_view(address, nbytes)[:] = result.reshape(-1).view(np.uint8)

        cuda.enqueue(handle, compute)
        self._streams.add(handle)
        if recording:
            self._recorded.append(weakref.ref(compute))
            if self._lazy:
                self._trt._faults.append("fallback kernels were recorded")
        self._ran_epoch = self._epoch
        self._compiled_shapes().add(self._shape_key())
        return True

    def _places(self) -> tuple[dict[str, tuple[int, Any, int]], str | None]:
        """Address, shape and dtype, and bytes of every tensor."""
        header, sizes = self._engine._header, {}
        places: dict[str, tuple[int, Any, int]] = {}
        for tensor in header.inputs:
            shape = self._shapes.get(tensor["name"], tuple(tensor["shape"]))
            if -1 in shape:
                return {}, f"no shape of {tensor['name']}"
            sizes[tensor["name"]] = shape
        for tensor in [*header.inputs, *header.outputs]:
            name = tensor["name"]
            if name not in self._addresses:
                return {}, f"no address of {name}"
            shape = sizes.get(name) or _output_shape(name, tensor["shape"], sizes)
            nbytes = int(np.prod(shape)) * np.dtype(tensor["dtype"]).itemsize
            places[name] = (self._addresses[name], (shape, np.dtype(tensor["dtype"])), nbytes)
        return places, None

    def _shape_key(self) -> str:
        return json.dumps(sorted(self._shapes.items()))

    def _compiled_shapes(self) -> set[str]:
        return self._engine._compiled if self._cache is None else self._cache._shapes

    def _refuse(self, reason: str) -> bool:
        self._engine._logger.log(self._trt.ILogger.ERROR, reason)
        return False


def _output_shape(
    output: str, shape: list[int], inputs: dict[str, tuple[int, ...]]
) -> tuple[int, ...]:
    """Fill the dynamic axes of an output: in our graphs P or Q and then M, or B of the encoder."""
    for name in ("mask_request", "input_ids", "images"):
        if name in inputs:
            dynamic = iter(inputs[name])
            if output == "low_res_masks":
                dynamic = iter((*inputs["mask_rows"], *inputs[name][1:]))
            return tuple(next(dynamic) if size == -1 else size for size in shape)
    raise AssertionError("not one of our graphs")


class IRuntimeConfig(_Unconstructible):
    def _set_specialization(self, strategy: Any) -> None:
        assert isinstance(strategy, self._trt.DynamicShapesKernelSpecializationStrategy)
        self._specialization = strategy

    dynamic_shapes_kernel_specialization_strategy = property(
        lambda self: self._specialization, _set_specialization
    )

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        assert isinstance(strategy, self._trt.ExecutionContextAllocationStrategy)
        self._strategy = strategy

    def create_runtime_cache(self) -> Any:
        return self._trt.IRuntimeCache._make(_shapes=set())

    def set_runtime_cache(self, cache: Any) -> bool:
        assert isinstance(cache, self._trt.IRuntimeCache)
        self._cache = cache
        return True


class IRuntimeCache(_Unconstructible):
    def deserialize(self, blob: bytes) -> bool:
        prefix = CACHE_MAGIC + self._trt._version.encode() + b" "
        if not bytes(blob).startswith(prefix):
            return False
        self._shapes.update(json.loads(bytes(blob)[len(prefix) :]))
        return True

    def serialize(self) -> IHostMemory:
        data = CACHE_MAGIC + self._trt._version.encode() + b" "
        data += json.dumps(sorted(self._shapes)).encode()
        made: IHostMemory = self._trt.IHostMemory._make(_data=data)
        return made


RUNTIME_SIDE = (
    Runtime,
    ICudaEngine,
    EngineInspector,
    IExecutionContext,
    IRuntimeConfig,
    IRuntimeCache,
)


def runtime_module(version: str, cuda: FakeCuda, backend: str = "tensorrt") -> Any:
    """Return a module for a version that builds and runs; see the top of this file."""
    module = strict_module(version, backend, **{c.__name__: c for c in RUNTIME_SIDE})
    module._cuda, module._engines, module._faults = cuda, weakref.WeakSet(), []
    return module


def live_objects(trt: Any) -> dict[str, int]:
    """Engines and contexts that somebody still holds; ``trt._faults`` must be empty."""
    gc.collect()
    assert trt._faults == []
    engines = list(trt._engines)
    contexts = sum(len(engine._contexts) for engine in engines)
    return {k: v for k, v in {"engines": len(engines), "contexts": contexts}.items() if v}
