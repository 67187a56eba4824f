"""Optional packages: how they are imported, and who brings them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
from types import ModuleType

from tap_deploy.errors import MissingDependencyError, first_line

# What a module must have to be the one that is meant. Pip leaves a folder without it behind when
# one of two packages that share the folder is uninstalled, and Python imports such a folder.
_API = {
    "cuda.bindings.runtime": ("cudaMalloc",),
    "cuda.cudart": ("cudaMalloc",),
    "cupy": ("ndarray",),
    "onnx": ("ModelProto",),
    "onnx_ir": ("Model",),
    "onnxruntime": ("InferenceSession", "SessionOptions", "RunOptions", "get_available_providers"),
    "onnxruntime_ep_nv_tensorrt_rtx": ("get_library_path",),
    "onnxscript": ("script",),
    "pycocotools.mask": ("frPyObjects",),
    "pycuda.driver": ("Device",),
    "rasterio": ("open",),
    "safetensors": ("safe_open",),
    "sentencepiece": ("SentencePieceProcessor",),
    "shapely": ("polygonize",),
    "supervision": ("Detections",),
    "tensorrt": ("Runtime",),
    "tensorrt_rtx": ("Runtime",),
    "torch": ("Tensor",),
}


def load_module(name: str) -> ModuleType:
    """Import an optional module, and hold it against what it must have.

    Raises:
        ModuleNotFoundError: it, or a module that it needs, is not installed.
        ImportError: it is broken: a shared library is missing, or only a part of it is there.
    """
    if name == "onnxruntime":
        turn_telemetry_off()
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise
    # Foreign code; OSError is what ctypes raises where a shared library is missing.
    except Exception as exc:
        raise ImportError(f"{name}: {first_line(exc)}", name=name) from exc
    missing = next((part for part in _API.get(name, ()) if not hasattr(module, part)), None)
    if missing is not None:
        places = (getattr(module, "__file__", None), *getattr(module, "__path__", ()))
        where = next(filter(None, places), "a module without a file")
        raise ImportError(
            f"{where} has no {missing}: it is not {name}, or only what is left of it", name=name
        )
    return module


def require_module(name: str, use: str, extra: str) -> ModuleType:
    """Import the optional module that a use of this library needs.

    Args:
        name: of the module.
        use: what needs it, for the message: "COCO output".
        extra: of tap-deploy, which brings it.

    Raises:
        MissingDependencyError: it is not installed, or broken; the message has the command.
    """
    command = f'pip install "tap-deploy[{extra}]"'
    try:
        return load_module(name)
    except ImportError as exc:
        if isinstance(exc, ModuleNotFoundError) and exc.name == name:
            problem = f"{name} is not installed; {use} needs it: {command}"
        else:
            problem = (
                f"{name} is broken ({first_line(exc)}); {use} needs it: {command} --force-reinstall"
            )
        raise MissingDependencyError(problem) from exc


def turn_telemetry_off() -> None:
    """Turn onnxruntime's telemetry off. Call it before anything imports onnxruntime.

    From 1.29 on it looks up a host of Microsoft's in every process, keeps an id of the device in
    the home folder, and runs a thread that a forked process waits for in vain. What the user has
    set stays.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def distributions_of(module: str) -> list[str]:
    """Return what pip calls the installed packages that bring a module, in order."""
    names = importlib.metadata.packages_distributions().get(module, ())
    return sorted({name for name in names if name})


def version_of(module: str) -> str | None:
    """Return the version of the package that brings a module, None where pip knows of none.

    The module is not imported.
    """
    # Python 3.10 does not find the modules of every package; most are called as pip calls them.
    for name in (*distributions_of(module), module):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None
