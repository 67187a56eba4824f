"""A queue of graph calls, in which those that can share a call are taken together."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any

from tap_deploy.predictor import TapPredictor


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """A graph call that waits.

    Attributes:
        stage: name of the graph call, for metrics.
        run: does several works of the same ``key`` at once, and returns one result each, in order.
        key: works with equal keys may share a call; None for a work that stands alone.
        rows: regions of this work.
        values: what ``run`` needs to know about this work.
        future: takes the result; a cancelled one is not run.
        abandoned: set when nobody waits for the result any more.
        arrived: when the work was put, ``time.monotonic()``.
    """

    stage: str
    run: Callable[[TapPredictor, list[Work]], list[Any]]
    key: Hashable | None
    rows: int
    values: Any
    future: Future[Any] = dataclasses.field(default_factory=Future)
    abandoned: threading.Event = dataclasses.field(default_factory=threading.Event)
    arrived: float = dataclasses.field(default_factory=time.monotonic)


class WorkQueue:
    """Works in order of arrival, from many threads to many threads.

    Args:
        max_rows: regions that are taken together; a work with more is taken alone.
        max_wait_s: how long the first of a batch waits for others, seconds.
        pending: returns how many requests are being answered; a batch of all of them waits for
            nobody.
    """

    def __init__(self, *, max_rows: int, max_wait_s: float, pending: Callable[[], int]) -> None:
        self._max_rows, self._max_wait_s, self._pending = max_rows, max_wait_s, pending
        self._waiting: collections.deque[Work] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, work: Work) -> None:
        """Add a work; it is cancelled if the queue is closed."""
        with self._changed:
            if self._closed:
                work.future.cancel()
                return
            self._waiting.append(work)
            self._changed.notify_all()

    def discard(self, work: Work) -> None:
        """Remove a work that waits, with all that it holds; it is cancelled."""
        with self._changed:
            if work.future.cancel() and work in self._waiting:
                self._waiting.remove(work)

    def take(self) -> list[Work] | None:
        """Wait for work; return works that share a call, or None once the queue is closed.

        Futures of returned works are running: they can no longer be cancelled.
        """
        with self._changed:
            batch = self._first()
            while batch and (patience := self._patience(batch)) > 0:
                self._changed.wait(patience)
                self._add_companions(batch)
            return batch

    def close(self) -> None:
        """Cancel what waits, and end ``take`` in all threads."""
        with self._changed:
            self._closed = True
            while self._waiting:
                self._waiting.popleft().future.cancel()
            self._changed.notify_all()

    def _first(self) -> list[Work] | None:
        while True:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            work = self._waiting.popleft()
            if work.future.set_running_or_notify_cancel():
                batch = [work]
                self._add_companions(batch)
                return batch

    def _add_companions(self, batch: list[Work]) -> None:
        """Move works that can share the call of a batch to it."""
        key, room = batch[0].key, self._max_rows - _rows(batch)
        if key is None:
            return
        rest: collections.deque[Work] = collections.deque()
        while self._waiting:
            work = self._waiting.popleft()
            if work.key != key or work.rows > room:
                rest.append(work)
            elif work.future.set_running_or_notify_cancel():
                batch.append(work)
                room -= work.rows
        self._waiting.extend(rest)

    def _patience(self, batch: list[Work]) -> float:
        """Return how long a batch should still wait for others, seconds."""
        is_full = _rows(batch) >= self._max_rows or len(batch) >= self._pending()
        if batch[0].key is None or self._closed or is_full:
            return 0.0
        return batch[0].arrived + self._max_wait_s - time.monotonic()


def _rows(batch: list[Work]) -> int:
    return sum(work.rows for work in batch)
