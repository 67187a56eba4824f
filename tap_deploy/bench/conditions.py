"""Conditions of a measurement: machine, clocks, versions, precision, engines, memory."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from typing import Any

from tap_deploy import __version__
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.plans import all_records
from tap_deploy.machine.host import Host
from tap_deploy.machine.memory import memory_of, peak_rss_bytes
from tap_deploy.machine.state import gpu_conditions, machine_state, state_as_dict
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.timing import utc_now

PACKAGES = (
    *("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx"),
    *("cuda-python", "cuda-bindings", "pycuda", "torch", "openvino"),
)
GOVERNOR = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryMark:
    """Memory use at one time.

    Attributes:
        available_bytes: available host memory, bytes.
        gpu: used GPU memory as printed by ``nvidia-smi``; None if unknown, as on a Jetson.
    """

    available_bytes: int
    gpu: str | None

    @classmethod
    def now(cls, host: Host) -> MemoryMark:
        """Return the current memory use."""
        answer = host.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader"])
        lines = [line for line in answer.output.splitlines() if line.strip()[:1].isdigit()]
        used = lines[0].strip() if lines else None
        return cls(available_bytes=memory_of(host).available_bytes, gpu=used)


def conditions(
    bundle: Bundle, run_on: RunOn, settings: dict[str, Any], host: Host
) -> dict[str, Any]:
    """Return the conditions of a run as JSON types.

    Args:
        bundle: the bundle.
        run_on: backend, precision and device.
        settings: the options of the run.
        host: the machine.
    """
    state = machine_state(host)
    return {
        "date": utc_now(),
        "machine": state_as_dict(state),
        "model": bundle.manifest.model,
        "weights": bundle.manifest.checkpoint.file,
        "backend": run_on.backend,
        "precision": run_on.precision,
        "variant": run_on.variant,
        "provider": run_on.provider,
        "settings": settings,
        "engines": _engines(bundle, run_on, state.compute_capability),
        "versions": {"tap-deploy": __version__, "python": platform.python_version(), **_versions()},
        "cpu": {"governor": host.text(GOVERNOR), "load": os.getloadavg()[0]},
        "gpu_before": gpu_conditions(host),
    }


def peak_memory(before: MemoryMark, after: MemoryMark, host: Host) -> dict[str, Any]:
    """Return the memory use of loading and running; on a Jetson it includes GPU memory."""
    return {
        "peak_rss_bytes": peak_rss_bytes(host),
        "available_before_bytes": before.available_bytes,
        "available_after_bytes": after.available_bytes,
        "gpu_used_before": before.gpu,
        "gpu_used_after": after.gpu,
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _engines(bundle: Bundle, run_on: RunOn, compute_capability: str | None) -> list[dict[str, Any]]:
    """Return builder, size and layers of the engines that may have run, from their sidecars."""
    if not run_on.is_engine:
        return []
    fields: tuple[str, ...] = ("graph", "backend_version", "compute_capabilities", "driver")
    fields += ("size_bytes", "build_seconds", "flags", "profiles", "layer_precisions")
    return [
        {"plan": str(path.relative_to(bundle.path))}
        | {name: getattr(record, name) for name in fields}
        for path, record in all_records(bundle)
        if (record.backend, record.variant) == (run_on.backend, run_on.variant)
        and (compute_capability is None or record.runs_on(compute_capability))
    ]
