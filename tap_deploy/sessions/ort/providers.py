"""GPU providers of onnxruntime: session options, and a check that the GPU does the work.

``get_available_providers()`` only lists what was compiled in. If a provider's libraries or kernels
are missing, onnxruntime logs a line and runs the graph on the CPU without an error. Every graph is
therefore run once with profiling, and the profile shows which provider ran the nodes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tap_deploy import graphs
from tap_deploy.errors import InputError, SessionError, first_line
from tap_deploy.graphs import GraphSpec
from tap_deploy.sessions.contract import resolve_shape
from tap_deploy.sessions.ort.provider_libraries import (
    library_error,
    plugin_device,
    preload_libraries,
)
from tap_deploy.storage.unfinished import temporary_folder

logger = logging.getLogger(__name__)
PROVIDERS = {
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nv_tensorrt_rtx": "NvTensorRTRTXExecutionProvider",
}
CUDA, TENSORRT, PLUGIN = PROVIDERS.values()
# Operators that must run on the GPU. The CUDA provider leaves small shape nodes to the CPU on
# purpose.
HEAVY = ("MatMul", "Gemm", "Conv", "Attention", "Einsum")
# Optimisation sizes of TensorRT's profile, if below the maximum.
USUAL = {"P": 16, "N": 2}
# Keeps onnxruntime from recording a run by itself: its CUDA graphs are bound to one thread, and
# fail if another thread allocates during the capture.
NO_GRAPH = ("gpu_graph_id", "-1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provider:
    """A GPU provider and its settings.

    Attributes:
        name: full name of the provider.
        device_index: number of the GPU as CUDA counts it.
        stream: handle of the stream to use; 0 for a stream of its own.
        limits: axis name -> largest size. TensorRT builds one engine for all sizes up to these; a
            graph with another dynamic axis gets an engine per size, which takes minutes each.
        cache_folder: folder for the engines that TensorRT builds; None for no cache.
        tf32: whether fp32 matrix products may use TF32.
        record: whether runs will be recorded as CUDA graphs; used by the CUDA provider only.
    """

    name: str
    device_index: int = 0
    stream: int = 0
    limits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    cache_folder: pathlib.Path | None = None
    tf32: bool = False
    record: bool = False

    @classmethod
    def from_name(cls, name: str | None, device_index: int) -> Provider:
        """Return a provider by its short or full name; None for the CUDA provider.

        Raises:
            InputError: unknown provider.
        """
        full = PROVIDERS.get("cuda" if name is None else name, name)
        if full not in PROVIDERS.values():
            raise InputError(f"unknown provider {name!r}; expected one of {', '.join(PROVIDERS)}")
        return cls(name=str(full), device_index=device_index)

    def add_to(self, runtime: Any, options: Any, spec: GraphSpec) -> list[Any]:
        """Return the ``providers`` argument of ``InferenceSession``.

        For a plugin, the provider is added to the session options, and the list is empty.

        Raises:
            SessionError: this onnxruntime does not have the provider.
            MissingDependencyError: the plugin is not installed.
        """
        if self.name == PLUGIN:
            device = plugin_device(runtime, self.device_index)
            options.add_provider_for_devices([device], self._plugin_settings(spec))
            return []
        available = runtime.get_available_providers()
        if self.name not in available:
            raise SessionError(
                f"this onnxruntime has no {self.name}, only {', '.join(available)}; "
                "install onnxruntime-gpu, or use --device cpu"
            )
        preload_libraries(runtime, self.name)
        if self.name == CUDA:
            return [(CUDA, self._cuda_settings())]
        # The CUDA provider runs the nodes that TensorRT does not support.
        return [(TENSORRT, self._tensorrt_settings(spec)), (CUDA, self._cuda_settings())]

    def forbid_tf32(self) -> None:
        """Disable TF32 for TensorRT in onnxruntime, which only an environment variable can do.

        CUDA libraries read the variable once per process, so this must run before the first use of
        CUDA. A value set by the user is kept.
        """
        if self.name != CUDA and not self.tf32:
            os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")

    def has_profile(self, spec: GraphSpec) -> bool:
        """Whether one engine covers all sizes of a graph up to the limits."""
        return self.name != CUDA and bool(_axes(spec)) and _axes(spec) <= self.limits.keys()

    def _cuda_settings(self) -> dict[str, str]:
        settings = self._common_settings() | {"use_tf32": str(int(self.tf32))}
        return settings | ({"enable_cuda_graph": "1"} if self.record else {})

    def _tensorrt_settings(self, spec: GraphSpec) -> dict[str, str]:
        settings = self._common_settings() | self._profile(spec, "trt")
        folder = self._made_cache_folder()
        if folder is not None:
            for cache in ("trt_engine_cache", "trt_timing_cache"):
                settings |= {f"{cache}_enable": "1", f"{cache}_path": folder}
        return settings

    def _plugin_settings(self, spec: GraphSpec) -> dict[str, str]:
        settings = self._profile(spec, "nv")
        if self.stream:
            settings |= {"has_user_compute_stream": "1", "user_compute_stream": str(self.stream)}
        folder = self._made_cache_folder()
        return settings | ({} if folder is None else {"nv_runtime_cache_path": folder})

    def _common_settings(self) -> dict[str, str]:
        settings = {"device_id": str(self.device_index)}
        return settings | ({"user_compute_stream": str(self.stream)} if self.stream else {})

    def _made_cache_folder(self) -> str | None:
        """Create and return the cache folder; None, after a warning, if that fails."""
        if self.cache_folder is None:
            return None
        try:
            self.cache_folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            logger.warning("%s has no cache and rebuilds at every start: %s", self.name, exc)
            return None
        return str(self.cache_folder)

    def _profile(self, spec: GraphSpec, prefix: str) -> dict[str, str]:
        """Return minimum, optimisation and maximum shapes as ``name:1x2,other:3x4``."""
        if not self.has_profile(spec):
            return {}
        sizes = {
            "min": dict.fromkeys(self.limits, 1),
            "opt": {axis: min(USUAL.get(axis, most), most) for axis, most in self.limits.items()},
            "max": self.limits,
        }
        return {
            f"{prefix}_profile_{bound}_shapes": ",".join(
                f"{tensor.name}:{'x'.join(map(str, resolve_shape(tensor, chosen)))}"
                for tensor in spec.inputs
                if tensor.dynamic_axes
            )
            for bound, chosen in sizes.items()
        }


def _axes(spec: GraphSpec) -> set[str]:
    return {axis for tensor in spec.inputs for axis in tensor.dynamic_axes.values()}


Load = Callable[[Any, "str | os.PathLike[str]", GraphSpec, Any, "list[Any]"], Any]


def require_real_inference(
    runtime: Any,
    path: str | os.PathLike[str],
    spec: GraphSpec,
    options: Any,
    provider: Provider,
    load: Load,
) -> Any:
    """Load a graph, run it once at its smallest size on zeros, and return the session.

    Args:
        runtime: the module onnxruntime.
        path: the ONNX file.
        spec: expected inputs and outputs.
        options: session options; profiling is turned on in them.
        provider: provider that must run the graph.
        load: creates the session.

    Raises:
        SessionError: the provider is missing, fails, or leaves the work to the CPU.
        MissingDependencyError: the plugin of the provider is not installed.
    """
    providers = provider.add_to(runtime, options, spec)
    with temporary_folder() as folder:
        options.enable_profiling = True
        options.profile_file_prefix = os.path.join(folder, "probe")
        session = _loaded(
            runtime, spec, provider, lambda: load(runtime, path, spec, options, providers)
        )
        run_options = runtime.RunOptions()
        run_options.add_run_config_entry(*NO_GRAPH)
        try:
            outputs = session.run(None, _smallest_inputs(spec, provider.limits), run_options)
        except Exception as exc:
            raise _unusable(spec, provider, first_line(exc)) from exc
        profile = json.loads(pathlib.Path(session.end_profiling()).read_text("utf-8"))
    _require_work(profile, spec, provider)
    if not all(np.isfinite(output).all() for output in outputs):
        raise _unusable(spec, provider, "its results are not finite")
    return session


def _loaded(runtime: Any, spec: GraphSpec, provider: Provider, load: Callable[[], Any]) -> Any:
    """Return a session with the provider; otherwise raise with the dynamic linker's reason."""
    try:
        session = load()
    except SessionError as exc:
        reason = library_error(runtime, provider.name)
        if reason is None:
            raise
        raise _unusable(spec, provider, reason) from exc
    if session.get_providers()[0] != provider.name:
        reason = library_error(runtime, provider.name)
        raise _unusable(spec, provider, reason or "onnxruntime dropped it while loading")
    return session


def _smallest_inputs(spec: GraphSpec, limits: Mapping[str, int]) -> dict[str, np.ndarray]:
    smallest = dict.fromkeys(_axes(spec), 1) | {"N": min(2, limits.get("N", 2))}
    inputs = {t.name: np.zeros(resolve_shape(t, smallest), t.dtype) for t in spec.inputs}
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
