"""GPU providers of onnxruntime, and the proof that one really works.

``get_available_providers()`` lists what was compiled in. A provider whose libraries or kernels
are missing is dropped with a line in the log, and the CPU runs the graph: slowly, and without
an error. So every graph is run once, profiled, and the profile says who did the work.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from tap_deploy import graphs
from tap_deploy.errors import InputError, SessionError
from tap_deploy.graphs import GraphSpec
from tap_deploy.sessions.contract import resolve_shape

PROVIDERS = {
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nv_tensorrt_rtx": "NvTensorRTRTXExecutionProvider",
}
# What a GPU is for. Small nodes about shapes are left to the CPU on purpose, by CUDA's own rule.
HEAVY = ("MatMul", "Gemm", "Conv", "Attention", "Einsum")
SMALLEST = {"B": 1, "P": 1, "N": 2, "M": 1, "T": 1, "K": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provider:
    """A provider on a GPU, and the stream that it is to use (0: one of its own).

    engine_cache: folder for engines that the TensorRT provider builds; None builds anew.
    """

    name: str
    device_index: int = 0
    stream: int = 0
    engine_cache: pathlib.Path | None = None

    @classmethod
    def from_name(cls, name: str | None, device_index: int) -> Provider:
        """Return a provider by its short or full name; None is CUDA's.

        Raises:
            InputError: there is no such provider.
        """
        full = PROVIDERS.get("cuda" if name is None else name, name)
        if full not in PROVIDERS.values():
            raise InputError(f"unknown provider {name!r}; expected one of {', '.join(PROVIDERS)}")
        return cls(name=str(full), device_index=device_index)

    def providers(self) -> list[Any]:
        """Return the list that ``InferenceSession`` takes; the CPU is always behind it."""
        options = {"device_id": str(self.device_index)}
        if self.stream:
            options["user_compute_stream"] = str(self.stream)
        if self.name == PROVIDERS["cuda"]:
            return [(self.name, options)]
        special = dict(options)
        if self.name == PROVIDERS["tensorrt"] and self.engine_cache is not None:
            special["trt_engine_cache_enable"] = "1"
            special["trt_engine_cache_path"] = str(self.engine_cache)
        # What an engine cannot take, CUDA can.
        return [(self.name, special), (PROVIDERS["cuda"], options)]


Load = Callable[[Any, "str | os.PathLike[str]", GraphSpec, Any, "list[Any]"], Any]


def require_real_inference(
    runtime: Any,
    path: str | os.PathLike[str],
    spec: GraphSpec,
    options: Any,
    provider: Provider,
    load: Load,
) -> Any:
    """Load a graph and run it once, at its smallest, with zeros; return the session.

    Args:
        runtime: the module onnxruntime.
        path: the ONNX file.
        spec: what the graph must look like.
        options: of the session; profiling is turned on in them.
        provider: who is to run it.
        load: makes the session.

    Raises:
        SessionError: the provider is not there, fails, or leaves the work to the CPU.
    """
    available = runtime.get_available_providers()
    if provider.name not in available:
        raise SessionError(
            f"this onnxruntime has no {provider.name}, only {', '.join(available)}; "
            "install onnxruntime-gpu, or use --device cpu"
        )
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling = True
        options.profile_file_prefix = os.path.join(folder, "probe")
        session = load(runtime, path, spec, options, provider.providers())
        if session.get_providers()[0] != provider.name:
            raise _unusable(spec, provider, "onnxruntime dropped it while loading")
        try:
            outputs = session.run(None, _smallest_inputs(spec))
        except Exception as exc:
            reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
            raise _unusable(spec, provider, reason) from exc
        profile = json.loads(pathlib.Path(session.end_profiling()).read_text("utf-8"))
    _require_work(profile, spec, provider)
    if not all(np.isfinite(output).all() for output in outputs):
        raise _unusable(spec, provider, "its results are not finite")
    return session


def _smallest_inputs(spec: GraphSpec) -> dict[str, np.ndarray]:
    inputs = {t.name: np.zeros(resolve_shape(t, SMALLEST), t.dtype) for t in spec.inputs}
    if graphs.POINT_LABELS in inputs:
        inputs[graphs.POINT_LABELS][:] = 1
    return inputs


def _require_work(profile: list[dict[str, Any]], spec: GraphSpec, provider: Provider) -> None:
    nodes = [
        event["args"]
        for event in profile
        if event.get("cat") == "Node" and "provider" in event.get("args", {})
    ]
    if not any(node["provider"] == provider.name for node in nodes):
        raise _unusable(spec, provider, "it ran no node of the graph")
    left = [n for n in nodes if n["provider"] == "CPUExecutionProvider"]
    heavy = sorted({n["op_name"] for n in left if any(h in n["op_name"] for h in HEAVY)})
    if heavy:
        raise _unusable(spec, provider, f"{', '.join(heavy)} ran on the CPU")


def _unusable(spec: GraphSpec, provider: Provider, reason: str) -> SessionError:
    return SessionError(
        f"graph {spec.name}: {provider.name} is listed but does not work here: {reason}; "
        "see tap-export doctor, or use --device cpu"
    )
