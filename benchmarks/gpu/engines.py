"""Steps: build, self-test and latency of engines, if the builder is installed."""

from __future__ import annotations

import pathlib
import time

from benchmarks.gpu import latency
from benchmarks.gpu.context import MICRO, Context, Notes
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.cli import main
from tap_deploy.precisions import PRECISIONS

RTX = "tensorrt_rtx"


def run(context: Context, notes: Notes, backend: str) -> None:
    """Build and test the micro bundle in every precision, then build and time the large bundle.

    If the builder does not support this GPU, its error message is the finding.
    """
    path = context.bundle(MICRO)
    precisions = [name for name in PRECISIONS if name in Bundle.open(path).manifest.graphs]
    for precision in precisions:
        with notes.check(f"micro {precision}") as found:
            found["build_s"] = _build(path, backend, precision)
            command = ["selftest", str(path), "--backend", backend, "--precision", precision]
            main(command, standalone_mode=False)
    notes.require()
    large = context.bundle(context.model)
    notes.put("build_s", _build(large, backend, "fp16"))
    latency.run(context, notes, "fp16", backend)


def _build(path: pathlib.Path, backend: str, precision: str) -> float:
    """Build the engines of a bundle with ``tap-export build``; return the seconds it took."""
    start = time.perf_counter()
    command = ["build", str(path), "--backend", backend, "--precision", precision]
    command += ["--compute-capability", "current"] if backend == RTX else []
    main(command, standalone_mode=False)
    return round(time.perf_counter() - start, 1)
