"""The GPU of this machine, asked through the driver library: no CUDA binding is needed.

It is the first that CUDA shows, which is where builders build, too: they take the current device of
the thread, and nothing here sets one. ``CUDA_VISIBLE_DEVICES`` makes another GPU the first.
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
    """The first GPU that CUDA would use.

    Attributes:
        name: as the driver calls it.
        compute_capability: like "8.7".
        driver: its version, and the newest CUDA version that it serves.
        integrated: it shares the memory of the CPU, as on Jetson.
    """

    name: str
    compute_capability: str
    driver: str
    integrated: bool


def local_gpu() -> Gpu | None:
    """Return the first GPU of this machine; None if there is none, or no driver for it."""
    try:
        return gpu_from_driver(ctypes.CDLL(_LIBRARY))
    except OSError:
        return None


def gpu_from_driver(cuda: Any) -> Gpu | None:
    """Return the first GPU that a loaded driver library knows; None if it knows none."""
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
    """Return the release of the kernel driver, like "580.65.06"."""
    try:
        match = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", path.read_text("utf-8"))
    except OSError:
        return None
    return match.group() if match else None
