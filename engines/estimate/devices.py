"""Data-sheet peaks, bandwidth and memory of GPUs."""

from __future__ import annotations

import dataclasses

from tap_deploy.errors import InputError

GIBIBYTE = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """Theoretical peaks of a GPU, without sparsity.

    Attributes:
        name: value of ``--device``.
        title: product name.
        compute_capability: SM version that engines are bound to, ``major.minor``.
        fp16_tflops: dense tensor core peak with fp32 accumulation, 1e12 operations per second.
        int8_tops: dense tensor core peak, 1e12 operations per second.
        gigabytes_per_second: DRAM bandwidth, 1e9 bytes per second.
        memory_bytes: total DRAM, including the system's share, bytes.
        memory_is_shared: whether CPU and GPU share the DRAM.
        source: source of the figures.
    """

    name: str
    title: str
    compute_capability: str
    fp16_tflops: float
    int8_tops: float
    gigabytes_per_second: float
    memory_bytes: int
    memory_is_shared: bool
    source: str

    @property
    def tf32_tflops(self) -> float:
        """Peak of fp32 graphs built with ``--tf32``; otherwise they do not use tensor cores."""
        return self.fp16_tflops / 2

    def peak_flops(self, precision: str) -> float:
        """Return the peak of ``fp32`` (TF32), ``fp16`` or ``int8``, operations per second."""
        peaks = {"fp32": self.tf32_tflops, "fp16": self.fp16_tflops, "int8": self.int8_tops}
        return 1e12 * peaks[precision]


def _jetson(
    name: str, title: str, sm: str, rates: tuple[float, float, float], gib: int, source: str
) -> DeviceProfile:
    return _device(name, title, sm, rates, gib, source, shared=True)


def _device(
    name: str,
    title: str,
    sm: str,
    rates: tuple[float, float, float],
    gib: int,
    source: str,
    *,
    shared: bool = False,
) -> DeviceProfile:
    fp16, int8, bandwidth = rates
    return DeviceProfile(
        name=name,
        title=title,
        compute_capability=sm,
        fp16_tflops=fp16,
        int8_tops=int8,
        gigabytes_per_second=bandwidth,
        memory_bytes=gib * GIBIBYTE,
        memory_is_shared=shared,
        source=source,
    )


# Jetson data sheets give INT8 (Orin) or FP4 (Thor) with sparsity, including the DLAs. The figures
# below are for the GPU alone and dense (INT8 = sparse / 2, FP16 = INT8 / 2), in the highest power
# mode.
_ORIN_SUPER = "NVIDIA Jetson Orin data sheet, Super mode of JetPack 6.2; GPU alone, dense"
_AGX_ORIN = "NVIDIA Jetson AGX Orin data sheet; GPU alone, dense"
_PROFILES = (
    _jetson("orin-nano", "Jetson Orin Nano Super 8 GB", "8.7", (16.7, 33.4, 102), 8, _ORIN_SUPER),
    _jetson("orin-nx", "Jetson Orin NX Super 16 GB", "8.7", (19.2, 38.4, 102), 16, _ORIN_SUPER),
    _jetson("agx-orin", "Jetson AGX Orin 64 GB", "8.7", (42.6, 85.2, 205), 64, _AGX_ORIN),
    _jetson(
        "thor",
        "Jetson AGX Thor (T5000) 128 GB",
        "11.0",
        (258, 517, 273),
        128,
        "NVIDIA Jetson Thor data sheet: 1035 dense FP4 TFLOPS, a quarter of it in FP16",
    ),
    _device(
        "h100",
        "H100 SXM 80 GB",
        "9.0",
        (989, 1979, 3350),
        80,
        "NVIDIA H100 data sheet, dense",
    ),
    _device(
        "h200",
        "H200 SXM 141 GB",
        "9.0",
        (989, 1979, 4800),
        141,
        "NVIDIA H200 data sheet, dense",
    ),
    _device(
        "a100",
        "A100 SXM 80 GB",
        "8.0",
        (312, 624, 2039),
        80,
        "NVIDIA A100 data sheet, dense",
    ),
    _device("l4", "L4 24 GB", "8.9", (121, 242, 300), 24, "NVIDIA L4 data sheet, dense"),
    _device(
        "rtx3090",
        "GeForce RTX 3090 24 GB",
        "8.6",
        (71, 284, 936),
        24,
        "NVIDIA Ampere GA102 whitepaper: FP16 with FP32 sums, dense",
    ),
    _device(
        "rtx4090",
        "GeForce RTX 4090 24 GB",
        "8.9",
        (165.2, 660.6, 1008),
        24,
        "NVIDIA Ada whitepaper: FP16 with FP32 sums, dense",
    ),
    _device(
        "rtx5090",
        "GeForce RTX 5090 32 GB",
        "12.0",
        (209.5, 838, 1792),
        32,
        "NVIDIA RTX Blackwell whitepaper: FP16 with FP32 sums, dense",
    ),
)
DEVICE_PROFILES = {profile.name: profile for profile in _PROFILES}


def device_profile(name: str) -> DeviceProfile:
    """Return the profile of a device.

    Raises:
        InputError: unknown device.
    """
    if name not in DEVICE_PROFILES:
        raise InputError(f"unknown device {name!r}; expected one of {', '.join(DEVICE_PROFILES)}")
    return DEVICE_PROFILES[name]
