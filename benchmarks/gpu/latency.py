"""Steps: latency of every stage on onnxruntime's CUDA provider or on engines."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

from benchmarks.gpu.context import VIT_B, Context, Notes, StepFailed
from benchmarks.gpu.provider import require_provider
from tap_deploy import TapPredictor
from tap_deploy.bench.conditions import MemoryMark, conditions
from tap_deploy.bench.stages import Inputs, stages
from tap_deploy.bench.tasks import CAPTION, ENCODE, END_TO_END, Task, figures
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.machine.host import Host
from tap_deploy.machine.state import gpu_conditions
from tap_deploy.sessions.gpu.pipeline import DevicePipeline
from tap_deploy.sessions.opening import pipeline_from_bundle
from tap_deploy.sessions.options import DeviceOptions
from tap_deploy.sessions.pipeline import Pipeline
from tap_deploy.sessions.run_on import ONNXRUNTIME, RunOn
from tap_deploy.timing import MIN_ITERATIONS, Latency, durations

PROMPTS = (1, 16, 47)
ENCODER_GFLOP = {VIT_B: 808}  # one 1024x1024 picture


def run(
    context: Context,
    notes: Notes,
    precision: str,
    backend: str = ONNXRUNTIME,
    *,
    tf32: bool = False,
) -> None:
    """Time encode, decode, caption and end to end, with and without CUDA graphs."""
    if backend == ONNXRUNTIME:
        require_provider()
    bundle = Bundle.open(context.bundle(context.model), check_hashes=False)
    run_on = RunOn(backend=backend, precision=precision, device="cuda", allow_failed=True)
    time_bundle(bundle, context, notes, run_on, tf32=tf32)
    _note_share(context, notes, "TF32" if tf32 else precision)
    rows = [s for s in notes.values["stages"] if s["cuda_graphs"] and _is_told(s)]
    told = ", ".join(f"{s['stage'].split(',')[0]} {s['latency']['median_ms']:.2f}" for s in rows)
    notes.put("headline", f"{told} ms")
    notes.require()


def time_bundle(
    bundle: Bundle, context: Context, notes: Notes, run_on: RunOn, *, tf32: bool = False
) -> None:
    """Time every stage; each result is noted at once."""
    host = Host()
    settings = {"seconds": context.seconds, "tf32": tf32}
    notes.put("conditions", conditions(bundle, run_on, settings, host))
    start = time.monotonic()
    recorded = DeviceOptions(tf32=tf32)
    _time_one_way(bundle, context, notes, run_on, recorded)
    if context.left_s < 1.2 * (time.monotonic() - start):
        notes.put("left_out", "without CUDA graphs: no time")
    else:
        enqueued = dataclasses.replace(recorded, cuda_graphs=False)
        _time_one_way(bundle, context, notes, run_on, enqueued)
    notes.put("gpu_after", gpu_conditions(host))


def _time_one_way(
    bundle: Bundle, context: Context, notes: Notes, run_on: RunOn, options: DeviceOptions
) -> None:
    host = Host()
    before, start = MemoryMark.now(host), time.perf_counter()
    cuda_graphs = options.cuda_graphs
    print(_words(cuda_graphs), flush=True)
    pipeline = pipeline_from_bundle(bundle, run_on, options)
    try:
        loaded = {"cuda_graphs": cuda_graphs, "seconds": time.perf_counter() - start}
        with notes.check(f"results are finite, {_words(cuda_graphs)}"):
            require_finite(bundle, pipeline)
        with stages(bundle.config, pipeline, PROMPTS, None) as tasks:
            for task in filter(is_wanted, tasks):
                notes.add("stages", timed(task, context.seconds) | {"cuda_graphs": cuda_graphs})
        after = MemoryMark.now(host)
        notes.add("loads", loaded | {"gpu_before": before.gpu, "gpu_after": after.gpu})
        notes.add("recorded", _recorded(pipeline))
    finally:
        pipeline.close()


def is_wanted(task: Task) -> bool:
    """Return whether a task is timed; end to end only for the largest number of regions."""
    return task.kind != END_TO_END or task.prompts == max(PROMPTS)


def require_finite(bundle: Bundle, pipeline: Pipeline) -> None:
    """Run once and check the results, as NaN changes the run time.

    Raises:
        StepFailed: a result is not finite.
    """
    inputs = Inputs.random(bundle.config, max(PROMPTS))
    boxes = inputs.coords.reshape(-1, 4)  # [P, 2, 2] XY to [P, 4] XYXY; the picture is the frame
    predictor = TapPredictor(pipeline, bundle.config)
    regions = predictor.predict(inputs.images[0], boxes=boxes, captions=False)
    for name in ("low_res_masks", "iou_predictions", "semantic_tokens", "semantic_embeddings"):
        if not np.isfinite(getattr(regions, name)).all():
            raise StepFailed(f"{name} are not finite; latency in this precision is meaningless")


def timed(task: Task, seconds: float) -> dict[str, Any]:
    """Time a task, print its median, and return its figures as JSON types."""
    gpu_ms: list[float] = []

    def after_call(name: str) -> None:
        if task.gpu_ms is not None:
            gpu_ms.append(task.gpu_ms())

    found = durations(
        {"": task.call},
        min_iterations=MIN_ITERATIONS,
        min_seconds=seconds,
        after_call=after_call,
    )
    latency = Latency.from_seconds(found[""])
    print(f"{task.name}: {latency.median_ms:.3f} ms", flush=True)
    return figures(task, latency, gpu_ms)


def _recorded(pipeline: Pipeline) -> dict[str, Any]:
    """Return the number of replayed caption steps; None if the pipeline does not count them."""
    replayed = pipeline.steps_replayed if isinstance(pipeline, DevicePipeline) else None
    return {"steps_replayed": replayed}


def _note_share(context: Context, notes: Notes, precision: str) -> None:
    """Note the encoder's share of the matrix product peak, if this run measured the peak."""
    ceiling = context.notes_of("ceilings").get("values", {}).get(f"{precision} TFLOP/s")
    encode = next((s for s in notes.values["stages"] if s["kind"] == ENCODE), None)
    gflop = ENCODER_GFLOP.get(context.model)
    if ceiling and encode and gflop:
        reached = gflop / encode["latency"]["median_ms"]  # GFLOP per ms = TFLOP/s
        notes.put("encoder_tflops", reached)
        notes.put("encoder_share_of_gemm", reached / ceiling)


def _is_told(stage: dict[str, Any]) -> bool:
    return stage["kind"] in (ENCODE, END_TO_END) or (
        stage["kind"] == CAPTION and stage["prompts"] == max(PROMPTS)
    )


def _words(cuda_graphs: bool) -> str:
    return "with CUDA graphs" if cuda_graphs else "without CUDA graphs"
