"""A timed call, and the figures of a candidate in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from tap_deploy.timing import Latency

END_TO_END, ENCODE, DECODE, CAPTION = "end to end", "encode", "decode", "caption"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A call to time.

    Attributes:
        kind: ``encode``, ``decode``, ``caption`` or ``end to end``, or the name of a workload.
        prompts: regions per picture; 1 for the encoder.
        tokens: steps of the text decoder after the prefix; 0 if it does not run.
        call: runs the task once, synchronously.
        pictures: pictures per call.
        gpu_ms: returns the time that the last call took on the GPU, ms; None if it is not measured.
    """

    kind: str
    prompts: int
    tokens: int
    call: Callable[[], object]
    pictures: int = 1
    gpu_ms: Callable[[], float] | None = None

    @property
    def key(self) -> str:
        """Name of the task with its sizes; the same for all candidates."""
        if self.kind == ENCODE:
            return f"{self.kind} 1 image"
        pictures = f"{self.pictures} images, " if self.pictures > 1 else ""
        return f"{self.kind} {pictures}P={self.prompts}"

    @property
    def name(self) -> str:
        """``key``, with the caption steps of this candidate."""
        return self.key + (f", {self.tokens} tokens" if self.tokens else "")


def figures(task: Task, latency: Latency, gpu_ms: Sequence[float] | None = None) -> dict[str, Any]:
    """Return the figures of a task as JSON types.

    Throughput is from the mean latency, time per caption step from the median.
    """
    seconds = latency.mean_ms / 1e3
    values = {
        "stage": task.name,
        "kind": task.kind,
        "prompts": task.prompts,
        "pictures": task.pictures,
        "tokens": task.tokens,
        "latency": dataclasses.asdict(latency),
        "is_noisy": latency.is_noisy,
    }
    if task.kind == ENCODE or task.pictures > 1:
        values["images_per_second"] = task.pictures / seconds
    if task.kind != ENCODE:
        values["regions_per_second"] = task.pictures * task.prompts / seconds
    if task.tokens:
        values["tokens_per_second"] = task.pictures * task.prompts * task.tokens / seconds
    if task.kind == CAPTION:
        # The visual prefix is also a step.
        values["microseconds_per_step"] = 1e3 * latency.median_ms / (task.tokens + 1)
    if gpu_ms:
        on_gpu = Latency.from_seconds([ms / 1e3 for ms in gpu_ms])
        values["gpu"] = dataclasses.asdict(on_gpu)
        values["host_ms"] = max(latency.median_ms - on_gpu.median_ms, 0.0)
    return values
