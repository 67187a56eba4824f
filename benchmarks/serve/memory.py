"""Memory of the server while it works."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from benchmarks.serve.target import Target

EVERY_S = 0.25
MB = 1e6
# The first share of a run, in which onnxruntime's arenas grow to the largest batches.
SETTLING = 0.3
# glibc keeps what is free in the arena of each thread, which makes the pages go up and down.
GROWTH_LIMIT = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
    """Resident memory over the time of a run, after its first part.

    Attributes:
        first_bytes: median of the first quarter, bytes.
        last_bytes: median of the last quarter, bytes.
        most_bytes: maximum of the whole run, bytes.
        slope_bytes_per_minute: of a straight line through all measurements, bytes.
    """

    first_bytes: float
    last_bytes: float
    most_bytes: float
    slope_bytes_per_minute: float

    @property
    def share(self) -> float:
        """Growth from the first to the last quarter, as a share of the first."""
        return self.last_bytes / self.first_bytes - 1

    @property
    def is_flat(self) -> bool:
        """Whether the memory stays within the bound."""
        return self.share <= GROWTH_LIMIT

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return dataclasses.asdict(self) | {"share": self.share, "limit": GROWTH_LIMIT}


class MemoryWatch:
    """Measurements of one run."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._bytes: list[int] = []

    async def watch(self, target: Target) -> None:
        """Measure until cancelled."""
        while True:
            self._times.append(time.monotonic())
            self._bytes.append(target.state().resident_bytes)
            await asyncio.sleep(EVERY_S)

    def growth(self) -> Growth:
        """Return the growth since the memory has settled."""
        settled = int(len(self._bytes) * SETTLING)
        times, sizes = np.array(self._times[settled:]), np.array(self._bytes[settled:])
        quarter = max(1, len(sizes) // 4)
        slope = np.polyfit(times - times[0], sizes, 1)[0] if len(sizes) > 1 else 0.0
        return Growth(
            first_bytes=float(np.median(sizes[:quarter])),
            last_bytes=float(np.median(sizes[-quarter:])),
            most_bytes=float(max(self._bytes)),
            slope_bytes_per_minute=float(60 * slope),
        )


@contextlib.asynccontextmanager
async def watched(target: Target) -> AsyncIterator[MemoryWatch]:
    """Measure the memory of a server until the end of the block."""
    watch = MemoryWatch()
    task = asyncio.ensure_future(watch.watch(target))
    try:
        yield watch
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
