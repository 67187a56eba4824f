"""Detects the GPU and packages of this machine without importing the packages."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pathlib
import sys

GPU = "an NVIDIA GPU"
INSTALL = {
    "PIL": "Pillow",
    "cupy": "cupy-cuda13x or cupy-cuda12x",
    "tensorrt_rtx": "tensorrt-rtx",
}


def gpu_problem() -> str | None:
    """Return why no GPU is usable; None if one is."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as exc:
        return f"no NVIDIA driver: {exc}"
    count = ctypes.c_int(0)
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code:
        return f"the NVIDIA driver failed to initialise: CUDA error {code}"
    return None if count.value else "the NVIDIA driver finds no GPU"


def missing(needs: tuple[str, ...]) -> str | None:
    """Return why a step with these needs cannot run; None if it can.

    Args:
        needs: modules; ``GPU``; alternatives are written ``cupy|torch``.
    """
    for need in needs:
        if need == GPU:
            problem = gpu_problem()
            if problem is not None:
                return problem
        elif not any(map(_is_installed, need.split("|"))):
            names = [INSTALL.get(name, name) for name in need.split("|")]
            return f"{' or '.join(names)} is not installed"
    return None


def library_path() -> dict[str, str]:
    """Return ``LD_LIBRARY_PATH`` with the CUDA libraries of installed Python packages appended.

    onnxruntime does not search there by itself.
    """
    folders = [
        str(f) for entry in sys.path for f in sorted(pathlib.Path(entry).glob("nvidia/*/lib"))
    ]
    if not folders:
        return {}
    before = os.environ.get("LD_LIBRARY_PATH", "")
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, [before, *folders]))}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # the parent package is missing or broken
        return False
