"""Latency measurement: warm-up, calls in turns, distributions, ratios of neighbouring calls."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

WARM_UP_SECONDS = 0.2
MIN_ITERATIONS = 10
MIN_SECONDS = 3.0
# Above this coefficient of variation, the machine was too busy for a reliable mean.
NOISY_CV = 0.025
# Wider interquartile ranges around 1 do not show that two candidates are equally fast.
WIDE_SPREAD = 0.05
# After a call, threads of onnxruntime spin in case there is more work (for 40 to 70 ms, measured on
# two cores), and would take the cores of the next candidate.
PAUSE_SECONDS = 0.1


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
    def from_seconds(cls, seconds: Sequence[float]) -> Latency:
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ratio:
    """Ratio of the durations of two candidates, over pairs of neighbouring calls.

    A change of load affects both calls of a pair, so the ratio varies less than the durations.

    Attributes:
        pairs: number of pairs.
        median: median of the ratios of the pairs.
        low: 25th percentile of the ratios.
        high: 75th percentile of the ratios.
    """

    pairs: int
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float], base: Sequence[float]) -> Ratio:
        """Return how many times longer the calls of ``seconds`` took than those of ``base``.

        Both are durations in order, of as many calls.
        """
        ratios = np.array(seconds) / np.array(base)
        low, median, high = np.percentile(ratios, [25, 50, 75]).tolist()
        return cls(pairs=len(ratios), median=median, low=low, high=high)

    @property
    def spread(self) -> float:
        """Interquartile range over median."""
        return (self.high - self.low) / self.median

    @property
    def is_undecided(self) -> bool:
        """Whether the machine was too noisy to say which candidate is faster.

        True if the interquartile range contains 1 and is wider than ``WIDE_SPREAD``. A narrow
        range around 1 means that the candidates are equally fast.
        """
        return self.low <= 1 <= self.high and self.spread > WIDE_SPREAD


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    min_iterations: int = MIN_ITERATIONS,
    min_seconds: float = MIN_SECONDS,
    warm_up_seconds: float = WARM_UP_SECONDS,
) -> dict[str, Latency]:
    """Time candidates in turns; arguments as in ``durations``."""
    found = durations(
        candidates,
        min_iterations=min_iterations,
        min_seconds=min_seconds,
        warm_up_seconds=warm_up_seconds,
    )
    return {name: Latency.from_seconds(seconds) for name, seconds in found.items()}


def durations(
    candidates: Mapping[str, Callable[[], object]],
    *,
    min_iterations: int = MIN_ITERATIONS,
    min_seconds: float = MIN_SECONDS,
    warm_up_seconds: float = WARM_UP_SECONDS,
    after_call: Callable[[str], None] | None = None,
) -> dict[str, list[float]]:
    """Time candidates in turns, so that background load affects all of them equally.

    Each candidate first warms up for at least ``warm_up_seconds``, untimed. Timing ends once each
    candidate has at least ``min_iterations`` calls and ``min_seconds`` in total. A pause between
    candidates lets the threads of the previous one go to sleep.

    Args:
        candidates: name -> call to time.
        min_iterations: minimum number of timed calls of each candidate.
        min_seconds: minimum total duration of the timed calls of each candidate, seconds.
        warm_up_seconds: minimum duration of the warm-up of each candidate, seconds.
        after_call: called with the name of the candidate after each timed call, untimed.

    Returns:
        Name -> duration of each timed call in order, seconds; as many for every candidate.
    """
    for call in candidates.values():
        spent = 0.0
        while spent < warm_up_seconds:
            spent += _seconds(call)
    found: dict[str, list[float]] = {name: [] for name in candidates}
    while any(len(d) < min_iterations or sum(d) < min_seconds for d in found.values()):
        for name, call in candidates.items():
            if len(candidates) > 1:
                time.sleep(PAUSE_SECONDS)
            found[name].append(_seconds(call))
            if after_call is not None:
                after_call(name)
    return found


def _seconds(call: Callable[[], object]) -> float:
    # At least the resolution of the clock: with durations of 0, ``durations`` would never end.
    start = time.perf_counter()
    call()
    return max(time.perf_counter() - start, 1e-7)


def utc_now() -> str:
    """Return the current time to the second, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
