"""Counters of the server, in the format of Prometheus."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_REGIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "tap_requests", "Answered requests.", ["route", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "tap_request_seconds",
            "Time from the head of a request to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.rejected = Counter(
            "tap_rejected", "Requests that were not run.", ["reason"], registry=registry
        )
        self.pending = Gauge("tap_pending", "Requests that are being answered.", registry=registry)
        self.stage_seconds = Histogram(
            "tap_stage_seconds", "Time of a graph call.", ["stage"], buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.batch_regions = Histogram(
            "tap_batch_regions", "Regions of a graph call.", ["stage"], buckets=_REGIONS,
            registry=registry,
        )  # fmt: skip
        self.batch_requests = Histogram(
            "tap_batch_requests", "Requests that share a graph call.", ["stage"], buckets=_REGIONS,
            registry=registry,
        )  # fmt: skip
        self.images = Gauge("tap_images", "Pictures that are kept encoded.", registry=registry)
        self.ready = Gauge("tap_ready", "1 after the self-test, 0 before it.", registry=registry)

    @contextlib.contextmanager
    def graph_call(self, stage: str, *, requests: int, regions: int) -> Iterator[None]:
        """Count a graph call and time it."""
        start = time.perf_counter()
        yield
        self.stage_seconds.labels(stage).observe(time.perf_counter() - start)
        self.batch_requests.labels(stage).observe(requests)
        self.batch_regions.labels(stage).observe(regions)

    def text(self) -> bytes:
        """Return all counters in Prometheus' text format."""
        return generate_latest(self.registry)
