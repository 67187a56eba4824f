"""Measures which backend runs each graph faster on this CPU, for the backend ``cpu``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import numpy as np

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.engines.verdict.agreement import Case
from tap_deploy.engines.verdict.speed import (
    PROMPTS_PER_CALL,
    SpeedInputs,
    SpeedOptions,
    measure_graphs,
)
from tap_deploy.precisions import FP32, INT8, INT8_FP32
from tap_deploy.prompts import Prompts
from tap_deploy.sessions.cpu_choice import Times, store_times, version
from tap_deploy.sessions.opening import sessions_from_bundle
from tap_deploy.sessions.run_on import ONNXRUNTIME, OPENVINO, RunOn


def measure_cpu_choice(
    bundle: Bundle,
    *,
    threads: int | None = None,
    speed: SpeedOptions | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Times:
    """Time every graph in onnxruntime and OpenVINO in turns, and keep the times for this CPU.

    On one noise picture, 16 prompts and 16 captions, in fp32, and in int8 if the bundle has it.

    Args:
        bundle: the bundle; its model is the one that the choice applies to.
        threads: CPU threads per call; None for one per usable core.
        speed: duration of the timing; None for the default.
        on_stage: called with precision and graph before each timing.

    Returns:
        Precision -> graph -> backend -> median time of a call, ms.

    Raises:
        MissingDependencyError: a backend is not installed.
        SessionError: a graph does not load or run.
        InputError: the times cannot be stored.
    """
    for backend in (ONNXRUNTIME, OPENVINO):
        version(backend)  # raises before minutes of work
    precisions = [FP32, INT8] if INT8_FP32 in bundle.manifest.graphs else [FP32]
    times = {}
    for precision in precisions:

        def say(graph: str, precision: str = precision) -> None:
            if on_stage is not None:
                on_stage(f"{precision} {graph}")

        times[precision] = _measured(bundle, precision, threads, speed or SpeedOptions(), say)
    store_times(bundle.config, times)
    return times


def _measured(
    bundle: Bundle,
    precision: str,
    threads: int | None,
    speed: SpeedOptions,
    say: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    with contextlib.ExitStack() as stack:
        candidates = {}
        for backend in (ONNXRUNTIME, OPENVINO):
            run_on = RunOn(backend=backend, precision=precision, threads=threads, allow_failed=True)
            candidates[backend] = sessions_from_bundle(bundle, run_on)
            for session in candidates[backend].values():
                stack.enter_context(session)
        inputs = SpeedInputs.from_case(candidates[OPENVINO], bundle.config, _noise(bundle))
        tokens = np.repeat(inputs.semantic_tokens, PROMPTS_PER_CALL, axis=0)
        inputs = dataclasses.replace(inputs, semantic_tokens=tokens)
        latency = measure_graphs(candidates, bundle.config, inputs, speed, on_stage=say)
    return {
        graph: {backend: found.median_ms for backend, found in by_backend.items()}
        for graph, by_backend in latency.items()
    }


def _noise(bundle: Bundle) -> Case:
    """A picture of noise with one box; speed does not depend on the content."""
    size = bundle.config.image_size
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    box = [[size // 4, size // 4, size // 2, size // 2]]
    return Case(image=picture, prompts=Prompts.from_boxes(box))
