"""Latency measurement: warm-up, interleaved calls, distribution."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping

import numpy as np

WARM_UP_SECONDS = 0.2
MIN_ITERATIONS = 10
MIN_SECONDS = 3.0
# Above this coefficient of variation, the machine was too busy for a reliable mean.
NOISY_CV = 0.025


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
    """Distribution of the wall-clock time of one call.

    Attributes:
        iterations: number of timed calls.
        min_ms: minimum, ms.
        mean_ms: mean, ms.
        median_ms: median, ms.
        p90_ms: 90th percentile, ms.
        p95_ms: 95th percentile, ms.
        p99_ms: 99th percentile, ms.
        max_ms: maximum, ms.
        cv: coefficient of variation, standard deviation over mean.
    """

    iterations: int
    min_ms: float
    mean_ms: float
    median_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    cv: float

    @classmethod
    def from_seconds(cls, seconds: list[float]) -> Latency:
        """Summarise the durations of single calls, in seconds."""
        ms = 1e3 * np.array(seconds)
        median, p90, p95, p99 = np.percentile(ms, [50, 90, 95, 99]).tolist()
        return cls(
            iterations=len(seconds),
            min_ms=float(ms.min()),
            mean_ms=float(ms.mean()),
            median_ms=median,
            p90_ms=p90,
            p95_ms=p95,
            p99_ms=p99,
            max_ms=float(ms.max()),
            cv=float(ms.std() / ms.mean()),
        )

    @property
    def is_noisy(self) -> bool:
        """Whether the machine was too busy for a reliable mean."""
        return self.cv > NOISY_CV


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    min_iterations: int = MIN_ITERATIONS,
    min_seconds: float = MIN_SECONDS,
    warm_up_seconds: float = WARM_UP_SECONDS,
) -> dict[str, Latency]:
    """Time candidates in turns, so that background load affects all of them equally.

    Each candidate first warms up for at least ``warm_up_seconds``, untimed. Timing ends once each
    candidate has at least ``min_iterations`` calls and ``min_seconds`` in total.
    """
    for call in candidates.values():
        spent = 0.0
        while spent < warm_up_seconds:
            spent += _seconds(call)
    durations: dict[str, list[float]] = {name: [] for name in candidates}
    while any(len(d) < min_iterations or sum(d) < min_seconds for d in durations.values()):
        for name, call in candidates.items():
            durations[name].append(_seconds(call))
    return {name: Latency.from_seconds(seconds) for name, seconds in durations.items()}


def _seconds(call: Callable[[], object]) -> float:
    # At least the resolution of the clock: with durations of 0, ``measure`` would never end.
    start = time.perf_counter()
    call()
    return max(time.perf_counter() - start, 1e-7)
