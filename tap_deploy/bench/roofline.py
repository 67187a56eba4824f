"""Share of the roofline that a task reaches, from its work and the measured ceilings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from tap_deploy.bench.ceilings import Ceilings
from tap_deploy.bench.tasks import CAPTION, DECODE, ENCODE, Task
from tap_deploy.bench.workloads import CLICK, EVERYTHING
from tap_deploy.config import TapConfig
from tap_deploy.engines.estimate.roofline import moved_bytes
from tap_deploy.engines.estimate.work import GraphWork, graph_works
from tap_deploy.graphs import IMAGE_ENCODER, PROMPT_DECODER, TEXT_DECODER
from tap_deploy.precisions import FP16, FP32

ONE_POINT = (CLICK, EVERYTHING)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Lower bound of the time of a task at the measured ceilings.

    Attributes:
        gflop: work, 1e9 operations.
        megabytes: weights and activations moved, 1e6 bytes.
        compute_ms: time of the operations at the rate of a large matrix product, ms.
        memory_ms: time of the moves at the rate of a large copy, ms.
        roofline_ms: larger of the two, per graph, summed, ms.
    """

    gflop: float
    megabytes: float
    compute_ms: float
    memory_ms: float
    roofline_ms: float

    def shared(self, median_ms: float) -> dict[str, Any]:
        """Return the fields, and the share of the roofline at a latency, as JSON types."""
        return dataclasses.asdict(self) | {
            "share": self.roofline_ms / median_ms,
            "limited_by": "arithmetic" if self.compute_ms > self.memory_ms else "bandwidth",
        }


def roofline(
    config: TapConfig,
    task: Task,
    precision: str,
    ceilings: Ceilings,
) -> Roofline | None:
    """Return the roofline of a task; None if the product of its precision was not measured.

    The work is that of the exported graphs: one mask per prompt, weights read once per call, a KV
    cache that is half full on average.

    Args:
        config: sizes of the model.
        task: the task.
        precision: precision of the arithmetic: ``fp32``, ``fp16`` or ``bf16``.
        ceilings: what the machine reaches.
    """
    rate = ceilings.flops.get(precision)
    if rate is None:
        return None
    stored = FP32 if precision == FP32 else FP16
    flops = moved = compute = memory = bound = 0.0
    for work, calls in _works(config, task):
        operations, size = calls * work.flops, calls * moved_bytes(work, stored)
        times = operations / rate, size / ceilings.bytes_per_second
        flops, moved = flops + operations, moved + size
        compute, memory, bound = compute + times[0], memory + times[1], bound + max(times)
    return Roofline(
        gflop=flops / 1e9,
        megabytes=moved / 1e6,
        compute_ms=1e3 * compute,
        memory_ms=1e3 * memory,
        roofline_ms=1e3 * bound,
    )


def _works(config: TapConfig, task: Task) -> Iterator[tuple[GraphWork, int]]:
    """Yield the work of each graph, and the number of its calls."""
    steps = task.tokens + 1  # the visual prefix is also a step
    works = graph_works(
        config,
        prompts=task.prompts,
        points=1 if task.kind in ONE_POINT else 2,
        slots=max(1, steps // 2),
    )
    alone = {ENCODE: IMAGE_ENCODER, DECODE: PROMPT_DECODER, CAPTION: TEXT_DECODER}.get(task.kind)
    for graph, work in works.items():
        if alone not in (None, graph) or (graph == TEXT_DECODER and not task.tokens):
            continue
        yield work, task.pictures * (steps if graph == TEXT_DECODER else 1)
