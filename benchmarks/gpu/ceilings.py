"""Step: peak throughput of copies and matrix products on this GPU, by CuPy or torch."""

from __future__ import annotations

from benchmarks.gpu.context import Context, Notes, Skipped
from tap_deploy.bench.ceilings import GPU_REPEATS, best_seconds, gpu_device
from tap_deploy.errors import InputError


def run(context: Context, notes: Notes) -> None:
    """Note GB/s of copies and TFLOP/s of matrix products, the best of several rounds each."""
    try:
        device = gpu_device()
    except InputError as exc:
        raise Skipped(str(exc)) from exc
    notes.put("by", device.name)
    for name, call, amount in device.candidates():
        with notes.check(name) as found:
            found["value"] = round(amount / best_seconds(call, device.wait, GPU_REPEATS), 1)
    values = {check["name"]: check.get("value") for check in notes.values["checks"]}
    notes.put("values", values)
    notes.put("headline", ", ".join(f"{name} {value}" for name, value in values.items()))
    notes.require()
