"""Queries the GPU of this machine through the driver library, without a CUDA binding.

The GPU is the first one visible to CUDA. Builders use it too: they build on the current device of
the thread, and this package never changes that. ``CUDA_VISIBLE_DEVICES`` selects another GPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import pathlib
import re
from typing import Any

_LIBRARY = "libcuda.so.1"
_DRIVER_FILE = pathlib.Path("/proc/driver/nvidia/version")
# CUdevice_attribute, from cuda.h
_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _INTEGRATED = 75, 76, 18
_NAME_BYTES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """The first GPU visible to CUDA.

    Attributes:
        name: device name from the driver.
        compute_capability: compute capability, such as "8.7".
        driver: driver version, and the newest CUDA version that it supports.
        integrated: the GPU shares memory with the CPU, as on Jetson.
    """

    name: str
    compute_capability: str
    driver: str
    integrated: bool


def local_gpu() -> Gpu | None:
    """Return the first GPU of this machine; None without a GPU or driver."""
    try:
        return gpu_from_driver(ctypes.CDLL(_LIBRARY))
    except OSError:
        return None


def gpu_from_driver(cuda: Any) -> Gpu | None:
    """Return the first GPU that a loaded driver library reports; None without one."""
    device, version = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    name = ctypes.create_string_buffer(_NAME_BYTES)
    cuda.cuDeviceGetName(name, _NAME_BYTES, device)
    cuda.cuDriverGetVersion(ctypes.byref(version))

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    served = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=f"{attribute(_CAPABILITY_MAJOR)}.{attribute(_CAPABILITY_MINOR)}",
        driver=" ".join(filter(None, (_driver_release(), f"({served})"))),
        integrated=bool(attribute(_INTEGRATED)),
    )


def _driver_release(path: pathlib.Path = _DRIVER_FILE) -> str | None:
    """Return the release of the kernel driver, such as "580.65.06"; None if unknown."""
    try:
        match = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", path.read_text("utf-8"))
    except OSError:
        return None
    return match.group() if match else None
