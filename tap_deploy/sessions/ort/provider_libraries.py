"""Shared libraries and plugins of onnxruntime's GPU providers, and diagnosis of load errors."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import pathlib
from typing import Any

from tap_deploy.errors import MissingDependencyError, SessionError, first_line
from tap_deploy.optional_modules import load_module

PLUGIN_MODULE = "onnxruntime_ep_nv_tensorrt_rtx"
LIBRARIES = {
    "CUDAExecutionProvider": "libonnxruntime_providers_cuda.so",
    "TensorrtExecutionProvider": "libonnxruntime_providers_tensorrt.so",
}
SHARED_LIBRARY = "libonnxruntime_providers_shared.so"  # dependency of the provider libraries


@functools.cache
def preload_libraries(runtime: Any, provider: str) -> None:
    """Load a provider's dependencies from pip packages, where the dynamic linker does not look."""
    if hasattr(runtime, "preload_dlls"):  # CUDA and cuDNN, from 1.21 on
        # It prints missing libraries; a provider that needs them raises its own error.
        with contextlib.redirect_stdout(io.StringIO()):
            runtime.preload_dlls()
    if provider == "TensorrtExecutionProvider":
        with contextlib.suppress(ImportError):
            load_module("tensorrt")


def library_error(runtime: Any, provider: str) -> str | None:
    """Return why a provider's library does not load; None if it loads.

    onnxruntime itself only logs the reason. Builds without shared provider libraries have no file
    to check.
    """
    folder = pathlib.Path(runtime.__file__).parent / "capi"
    if provider not in LIBRARIES:
        return None
    shared, own = folder / SHARED_LIBRARY, folder / LIBRARIES[provider]
    if shared.exists() and not own.exists():
        return f"{own} is missing"
    for path in (shared, own):
        try:
            if path.exists():
                ctypes.CDLL(str(path))
        except OSError as exc:
            return str(exc)
    return None


def plugin_device(runtime: Any, index: int) -> Any:
    """Return the ``OrtEpDevice`` of TensorRT-RTX for a GPU, numbered as CUDA counts it.

    Raises:
        MissingDependencyError: the plugin is not installed, or this onnxruntime has no plugins.
        SessionError: the plugin does not load, or does not support the GPU.
    """
    name = _registered_plugin(runtime)
    kind = runtime.OrtDeviceMemoryType.DEFAULT
    for device in runtime.get_ep_devices():
        if device.ep_name == name and device.memory_info(kind).device_id == index:
            return device
    raise SessionError(
        f"{name} is registered but finds no GPU {index} that it supports; expected an RTX GPU, "
        "Ampere or later, and its driver; see nvidia-smi, or use --provider cuda"
    )


@functools.cache
def _registered_plugin(runtime: Any) -> str:
    """Register the plugin once per process and return the provider's name."""
    try:
        plugin: Any = load_module(PLUGIN_MODULE)
    except ImportError as exc:
        raise _no_plugin(first_line(exc)) from exc
    if not hasattr(runtime, "register_execution_provider_library"):
        raise _no_plugin(f"onnxruntime {runtime.__version__} does not support plugin providers")
    name = str(plugin.get_ep_name())
    try:
        runtime.register_execution_provider_library(name, plugin.get_library_path())
    # onnxruntime raises one class per status code, without a common base.
    except Exception as exc:
        raise SessionError(
            f"{name} does not load: {first_line(exc)}; is NVIDIA's driver installed? See nvidia-smi"
        ) from exc
    return name


def _no_plugin(reason: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"provider 'nv_tensorrt_rtx' is a plugin that cannot be loaded: {reason}; install it with: "
        'pip install "tap-deploy[ort-rtx]" (CUDA 13), or: '
        "pip install onnxruntime-ep-nv-tensorrt-rtx-cu12"
    )
