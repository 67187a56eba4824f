"""A fake onnxruntime with GPU providers: the CPU computes on the memory of a ``FakeCuda``.

Work that is bound to ``cuda`` is put into the stream that the session was given, and happens when
that stream is synchronized. TensorRT-RTX is a plugin, as it is in life. ``behaviour`` makes a
provider one that does not work:

- ``"drops"``: it vanishes while loading, as with missing libraries;
- ``"idle"``: it is there, and the profile shows that the CPU did the work;
- ``"partial"``: it took some nodes and left the products of matrices to the CPU;
- ``"fails"``: it raises when it runs;
- ``"nan"``: its results are not finite;
- ``"copies"``: it needs copies to the CPU within the text decoder, so that it cannot be recorded;
- ``"waits"``: a kernel waits for the GPU, which no recording allows.

``on_the_cpu`` names inputs that a session copies when they are bound, and says so; ``stale`` names
those that it copies once without saying so.
"""

from __future__ import annotations

import json
import pathlib
import sys
import types
from typing import Any

import numpy as np
import onnxruntime

from tap_deploy.sessions.ort.session import SLOW_ON_CPUS
from tests.fake_cuda import ALIGNMENT, FakeCuda

GPU_PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider")
PLUGIN = "NvTensorRTRTXExecutionProvider"
CPU = "CPUExecutionProvider"
DO_NOT_WAIT = "disable_synchronize_execution_providers"
GRAPH_ID = "gpu_graph_id"
NO_CAPTURE = (
    "This session cannot use the graph capture feature as requested by the user as all compute "
    "graph nodes have not been partitioned to the CUDAExecutionProvider"
)


def install(
    monkeypatch: Any,
    cuda: FakeCuda,
    behaviour: str = "works",
    *,
    on_the_cpu: tuple[str, ...] = (),
    stale: tuple[str, ...] = (),
    version: str = "1.31.1",
) -> types.ModuleType:
    """Put the fake in the place of onnxruntime; ``sessions`` of the module lists what was made."""
    module: Any = types.ModuleType("onnxruntime")
    module.__file__ = str(pathlib.Path(__file__))
    module.sessions, module.plugins, module.preloads = [], {}, 0
    module.SessionOptions = SessionOptions
    module.RunOptions = onnxruntime.RunOptions
    module.__version__ = version
    module.OrtDeviceMemoryType = onnxruntime.OrtDeviceMemoryType
    module.get_available_providers = lambda: [*GPU_PROVIDERS, CPU]

    def preload_dlls() -> None:
        print("Failed to load libcublas.so.13")
        module.preloads += 1

    def register(name: str, path: str) -> None:
        assert name not in module.plugins, f"EP library is already registered under {name}"
        module.plugins[name] = path

    def devices() -> list[EpDevice]:
        return [EpDevice(CPU, 0), *(EpDevice(n, i) for n in module.plugins for i in (0, 1))]

    def session(
        path: str,
        options: Any,
        providers: list[Any] | None = None,
        enable_fallback: int = 1,
        disabled_optimizers: list[str] | None = None,
    ) -> Any:
        assert not enable_fallback, "onnxruntime would retry on the CPU by itself"
        if providers == [CPU]:
            return onnxruntime.InferenceSession(
                path, options, providers=[CPU], disabled_optimizers=disabled_optimizers
            )
        assert disabled_optimizers == ["WeightBiasQuantization"]
        made = FakeSession(cuda, behaviour, path, options, providers or [])
        made.on_the_cpu, made.stale = on_the_cpu, stale
        module.sessions.append(made)
        return made

    module.preload_dlls = preload_dlls
    module.register_execution_provider_library = register
    module.get_ep_devices = devices
    module.InferenceSession = session
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    plugin: Any = types.ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    plugin.get_ep_name = lambda: PLUGIN
    plugin.get_library_path = lambda: "/libplugin.so"
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    return module


class SessionOptions(onnxruntime.SessionOptions):
    plugin: tuple[list[Any], dict[str, str]] | None = None

    def add_provider_for_devices(self, devices: list[Any], settings: dict[str, str]) -> None:
        self.plugin = (devices, settings)


def _is_set(run_options: Any, key: str) -> bool:
    try:
        return bool(run_options.get_run_config_entry(key) == "1")
    except RuntimeError:  # it was not set at all
        return False


class EpDevice:
    def __init__(self, name: str, index: int) -> None:
        self.ep_name, self.index = name, index

    def memory_info(self, kind: Any) -> Any:
        assert kind == onnxruntime.OrtDeviceMemoryType.DEFAULT
        return types.SimpleNamespace(device_id=self.index)


class FakeSession:
    on_the_cpu: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()

    def __init__(
        self, cuda: FakeCuda, behaviour: str, path: str, options: Any, providers: list[Any]
    ) -> None:
        assert options.intra_op_num_threads == options.inter_op_num_threads == 1
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        self.cuda, self.behaviour = cuda, behaviour
        pairs = [entry if isinstance(entry, tuple) else (entry, {}) for entry in providers]
        if options.plugin is not None:
            assert not pairs, "providers would replace the plugin"
            (device,), settings = options.plugin
            pairs = [(device.ep_name, settings)]
        self.providers = [name for name, _ in pairs if name != CPU] + [CPU]
        if behaviour == "drops":
            self.providers = [CPU]
        for _, settings in pairs:
            assert all(isinstance(value, str) for value in settings.values())
        self.options = dict(pairs)
        self.stream = int(pairs[0][1].get("user_compute_stream", 0))
        self.records = pairs[0][1].get("enable_cuda_graph") == "1"
        if self.records and behaviour == "copies":
            raise RuntimeError(NO_CAPTURE)
        self.session = onnxruntime.InferenceSession(
            path, options, providers=[CPU], disabled_optimizers=SLOW_ON_CPUS
        )
        self.get_inputs, self.get_outputs = self.session.get_inputs, self.session.get_outputs
        self.runs: dict[Any, int] = {}  # by shapes
        self.copies: dict[str, np.ndarray] = {}

    def get_input_memory_infos(self) -> list[Any]:
        return [
            types.SimpleNamespace(name="Cpu" if node.name in self.on_the_cpu else "Cuda")
            for node in self.get_inputs()
        ]

    def get_providers(self) -> list[str]:
        return self.providers

    def run(self, names: None, feeds: dict[str, np.ndarray], run_options: Any) -> list[np.ndarray]:
        assert run_options.get_run_config_entry(GRAPH_ID) == "-1", "it would record by itself"
        if self.behaviour == "fails":
            raise RuntimeError(
                "no kernel image is available for execution on the device\nat length"
            )
        results: list[np.ndarray] = self.session.run(names, feeds)
        if self.behaviour == "nan":
            results[0] = np.full_like(results[0], np.nan)
        return results

    def end_profiling(self) -> str:
        path = pathlib.Path(self.session.end_profiling())
        events = json.loads(path.read_text("utf-8"))
        for event in events:
            arguments = event.get("args", {})
            if "provider" in arguments and self._claims(arguments["op_name"]):
                arguments["provider"] = self.providers[0]
        path.write_text(json.dumps(events), "utf-8")
        return str(path)

    def _claims(self, op: str) -> bool:
        heavy = any(word in op for word in ("MatMul", "Gemm", "Conv"))
        return self.behaviour != "idle" and not (self.behaviour == "partial" and heavy)

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self)

    def run_with_iobinding(self, binding: FakeBinding, run_options: Any = None) -> None:
        places = {**binding.inputs, **binding.outputs}
        devices = {place[0] for place in places.values()}
        if devices == {"cpu"}:
            return self._run_on_host(binding)
        assert devices == {"cuda"}, "not everything is on the device"
        assert self.stream, "no stream: the order of our copies and its runs is not known"
        waits = not _is_set(run_options, DO_NOT_WAIT)
        assert waits is not self.records, "it would not free what it staged"
        assert run_options.get_run_config_entry(GRAPH_ID) == "-1", "it would record by itself"
        with self.cuda.called("run_with_iobinding"):
            self._allow_recording(binding)
            for _, dtype, shape, address in places.values():
                assert address % ALIGNMENT == 0
                self.cuda.device_view(address, int(np.prod(shape)) * dtype.itemsize)
            inputs, outputs = dict(binding.inputs), dict(binding.outputs)
            copies = dict(binding.copies)
            self.cuda.enqueue(self.stream, lambda: self._compute(inputs, outputs, copies))
            if waits:
                self.cuda.synchronize(self.stream)
        return None

    def _allow_recording(self, binding: FakeBinding) -> None:
        """With new shapes, the first run and the second allocate."""
        shapes = tuple(place[2] for place in binding.inputs.values())
        self.runs[shapes] = self.runs.get(shapes, 0) + 1
        if self.runs[shapes] <= 2 or self.behaviour == "waits":
            self.cuda._forbid_while_recording("malloc")
        if self.cuda.stream(self.stream).recording is not None:
            assert self.records, "host functions would become part of the recording"

    def _compute(
        self, inputs: dict[str, Any], outputs: dict[str, Any], copies: dict[str, np.ndarray]
    ) -> None:
        def view(place: Any) -> np.ndarray:
            _, dtype, shape, address = place
            size = int(np.prod(shape)) * dtype.itemsize
            return self.cuda.device_view(address, size).view(dtype).reshape(shape)

        arrays = {name: view(place).copy() for name, place in inputs.items()} | copies
        for name in self.stale:
            if name in arrays:
                arrays[name] = self.copies.setdefault(name, arrays[name])
        results = self.session.run(list(outputs), arrays)
        for place, result in zip(outputs.values(), results, strict=True):
            view(place)[...] = result

    def _run_on_host(self, binding: FakeBinding) -> None:
        real = self.session.io_binding()
        for name, (_, dtype, shape, address) in binding.inputs.items():
            real.bind_input(name, "cpu", 0, dtype, shape, address)
        for name, (_, dtype, shape, address) in binding.outputs.items():
            real.bind_output(name, "cpu", 0, dtype, shape, address)
        self.session.run_with_iobinding(real)


class FakeBinding:
    def __init__(self, session: FakeSession) -> None:
        self.session = session
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self.copies: dict[str, np.ndarray] = {}  # of inputs that the CPU consumes

    def synchronize_inputs(self) -> None:
        self.session.cuda._finish_everything()

    def bind_input(
        self, name: str, device: str, index: int, dtype: Any, shape: Any, address: int
    ) -> None:
        self.inputs[name] = (device, np.dtype(dtype), tuple(shape), address)
        if device == "cuda" and name in self.session.on_the_cpu:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            copy = self.session.cuda.device_view(address, size).copy()
            self.copies[name] = copy.view(dtype).reshape(shape)

    def bind_output(
        self, name: str, device: str, index: int, dtype: Any, shape: Any, address: int
    ) -> None:
        self.outputs[name] = (device, np.dtype(dtype), tuple(shape), address)
