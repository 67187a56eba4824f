"""Import of optional packages, and lookup of the distributions that provide them."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from types import ModuleType

from tap_deploy.errors import MissingDependencyError, first_line

# Attributes that identify a working module. When one of two packages that share a folder is
# uninstalled, pip leaves an incomplete folder behind, which Python still imports.
_API = {
    "cuda.bindings.runtime": ("cudaMalloc",),
    "cuda.cudart": ("cudaMalloc",),
    "cupy": ("ndarray",),
    "fastapi": ("FastAPI",),
    "huggingface_hub": ("HfApi", "hf_hub_download", "snapshot_download"),
    "jinja2": ("Environment",),
    "onnx": ("ModelProto",),
    "onnx_ir": ("Model",),
    "onnxruntime": ("InferenceSession", "SessionOptions", "RunOptions", "get_available_providers"),
    "onnxruntime_ep_nv_tensorrt_rtx": ("get_library_path",),
    "onnxscript": ("script",),
    "openvino": ("Core", "Tensor"),
    "prometheus_client": ("CollectorRegistry",),
    "pycocoevalcap.bleu.bleu": ("Bleu",),
    "pycocoevalcap.cider.cider": ("Cider",),
    "pycocoevalcap.meteor.meteor": ("Meteor",),
    "pycocoevalcap.tokenizer.ptbtokenizer": ("PUNCTUATIONS", "STANFORD_CORENLP_3_4_1_JAR"),
    "pycocotools.coco": ("COCO",),
    "pycocotools.cocoeval": ("COCOeval",),
    "pycocotools.mask": ("frPyObjects",),
    "pycuda.driver": ("Device",),
    "python_multipart": ("MultipartParser",),
    "rasterio": ("open",),
    "safetensors": ("safe_open",),
    "sentencepiece": ("SentencePieceProcessor",),
    "shapely": ("polygonize",),
    "supervision": ("Detections",),
    "tensorrt": ("Runtime",),
    "tensorrt_rtx": ("Runtime",),
    "torch": ("Tensor",),
    "uvicorn": ("Server",),
}


def load_module(name: str) -> ModuleType:
    """Import an optional module and check that it has the attributes in ``_API``.

    Raises:
        ModuleNotFoundError: the module, or one that it imports, is not installed.
        ImportError: the module is broken: a shared library or a part of it is missing.
    """
    if name in ("huggingface_hub", "onnxruntime", "openvino"):
        turn_telemetry_off()
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise
    # Third-party code may raise anything; ctypes raises OSError for a missing shared library.
    except Exception as exc:
        raise ImportError(f"{name}: {first_line(exc)}", name=name) from exc
    missing = next((part for part in _API.get(name, ()) if not hasattr(module, part)), None)
    if missing is not None:
        places = (getattr(module, "__file__", None), *getattr(module, "__path__", ()))
        where = next(filter(None, places), "a module without a file")
        raise ImportError(
            f"{where} has no {missing}: it is not {name}, or a leftover of it", name=name
        )
    return module


def require_module(name: str, use: str, extra: str) -> ModuleType:
    """Import the optional module that a feature needs.

    Args:
        name: module to import.
        use: name of the feature, for the message, such as "COCO output".
        extra: extra of tap-deploy that installs the module.

    Raises:
        MissingDependencyError: not installed, or broken; the message has the pip command.
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
    """Turn telemetry off; call this before the first import of a package that sends it.

    From 1.29 on, onnxruntime resolves a Microsoft host in every process, stores a device id in
    the home folder, and starts a thread that makes forked processes hang. OpenVINO reports its
    import to Google and stores an id in the home folder, unless its package for that is missing.
    huggingface_hub tells the hub which packages and programs use it.
    What the user has set, or imported before, is kept.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # An entry of None makes imports fail, as for a package that is not installed.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def distributions_of(module: str) -> list[str]:
    """Return the sorted names of the installed distributions that provide a module."""
    import importlib.metadata  # loads the email package, which no other part of a prediction needs

    names = importlib.metadata.packages_distributions().get(module, ())
    return sorted({name for name in names if name})


def version_of(module: str) -> str | None:
    """Return the version of the distribution that provides a module, or None if there is none.

    The module is not imported.
    """
    import importlib.metadata

    # Python 3.10 cannot map every module to its distribution; most have the same name.
    for name in (*distributions_of(module), module):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None
