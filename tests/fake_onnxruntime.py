"""onnxruntime as if it had GPU providers: the CPU computes, on the memory of a ``FakeCuda``.

Work that is bound to ``cuda`` is put into the stream that the session was given, and happens when
that stream is synchronized. ``behaviour`` makes a provider one that does not work:

- ``"drops"``: it vanishes while loading, as with missing libraries;
- ``"idle"``: it is there, and the profile shows that the CPU did the work;
- ``"partial"``: it took some nodes and left the products of matrices to the CPU;
- ``"fails"``: it raises when it runs;
- ``"nan"``: its results are not finite.
"""

from __future__ import annotations

import json
import pathlib
import sys
import types
from typing import Any

import numpy as np
import onnxruntime

from tests.fake_cuda import ALIGNMENT, FakeCuda

GPU_PROVIDERS = (
    "NvTensorRTRTXExecutionProvider",
    "TensorrtExecutionProvider",
    "CUDAExecutionProvider",
)
CPU = "CPUExecutionProvider"
DO_NOT_WAIT = "disable_synchronize_execution_providers"


def install(monkeypatch: Any, cuda: FakeCuda, behaviour: str = "works") -> types.ModuleType:
    """Put the fake in the place of onnxruntime; ``sessions`` of the module lists what was made."""
    module = types.ModuleType("onnxruntime")
    module.sessions = []  # type: ignore[attr-defined]
    module.SessionOptions = onnxruntime.SessionOptions  # type: ignore[attr-defined]
    module.RunOptions = onnxruntime.RunOptions  # type: ignore[attr-defined]
    module.get_available_providers = lambda: [*GPU_PROVIDERS, CPU]  # type: ignore[attr-defined]

    def session(path: str, options: Any, providers: list[Any], enable_fallback: int) -> Any:
        made = FakeSession(cuda, behaviour, path, options, providers, enable_fallback)
        module.sessions.append(made)  # type: ignore[attr-defined]
        return made

    module.InferenceSession = session  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    return module


class FakeSession:
    def __init__(
        self,
        cuda: FakeCuda,
        behaviour: str,
        path: str,
        options: Any,
        providers: list[Any],
        enable_fallback: int,
    ) -> None:
        assert not enable_fallback, "onnxruntime would retry on the CPU by itself"
        options.intra_op_num_threads = 1
        self.cuda, self.behaviour = cuda, behaviour
        pairs = [entry if isinstance(entry, tuple) else (entry, {}) for entry in providers]
        self.providers = [name for name, _ in pairs if name != CPU] + [CPU]
        if behaviour == "drops":
            self.providers = [CPU]
        for _, settings in pairs:
            assert all(isinstance(value, str) for value in settings.values())
        self.options = dict(pairs)
        self.stream = int(pairs[0][1].get("user_compute_stream", 0))
        self.session = onnxruntime.InferenceSession(path, options, providers=[CPU])
        self.get_inputs, self.get_outputs = self.session.get_inputs, self.session.get_outputs

    def get_providers(self) -> list[str]:
        return self.providers

    def run(self, names: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
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
        return FakeBinding()

    def run_with_iobinding(self, binding: FakeBinding, run_options: Any = None) -> None:
        places = {**binding.inputs, **binding.outputs}
        devices = {place[0] for place in places.values()}
        if devices == {"cpu"}:
            return self._run_on_host(binding)
        assert devices == {"cuda"}, "not everything is on the device"
        assert self.stream, "no stream: the order of our copies and its runs is not known"
        assert run_options.get_run_config_entry(DO_NOT_WAIT) == "1"
        with self.cuda.called("run_with_iobinding"):
            for _, dtype, shape, address in places.values():
                assert address % ALIGNMENT == 0
                self.cuda.device_view(address, int(np.prod(shape)) * dtype.itemsize)
            inputs, outputs = dict(binding.inputs), dict(binding.outputs)
            self.cuda.enqueue(self.stream, lambda: self._compute(inputs, outputs))
        return None

    def _compute(self, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        def view(place: Any) -> np.ndarray:
            _, dtype, shape, address = place
            size = int(np.prod(shape)) * dtype.itemsize
            return self.cuda.device_view(address, size).view(dtype).reshape(shape)

        arrays = {name: view(place).copy() for name, place in inputs.items()}
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
    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}

    def bind_input(
        self, name: str, device: str, index: int, dtype: Any, shape: Any, address: int
    ) -> None:
        self.inputs[name] = (device, np.dtype(dtype), tuple(shape), address)

    def bind_output(
        self, name: str, device: str, index: int, dtype: Any, shape: Any, address: int
    ) -> None:
        self.outputs[name] = (device, np.dtype(dtype), tuple(shape), address)
