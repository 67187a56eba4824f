"""Reading ahead: the next items are prepared in threads while one is worked on."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from tap_deploy.sessions.processes import ProcessBound

Item = TypeVar("Item")
Ready = TypeVar("Ready")
Result = TypeVar("Result")


class ReadAhead(ProcessBound, Generic[Item, Ready, Result]):
    """Three steps from an item to its result; steps of different items run side by side.

    ``prepare`` runs in as many threads as items are read ahead. ``join``, which takes several
    items at once, and ``finish`` run in one more thread, in the order of the items.
    """

    def __init__(
        self,
        prepare: Callable[[Item], Ready],
        join: Callable[[list[Ready]], list[Ready]],
        finish: Callable[[Ready], Result],
        *,
        group_size: int,
        read_ahead: int,
    ) -> None:
        """Put the steps together.

        Args:
            prepare: makes an item ready.
            join: takes up to ``group_size`` prepared items to the next step.
            finish: makes the result of an item.
            group_size: items of a call of ``join``.
            read_ahead: items that may be taken beyond the one whose result is yielded; a group
                more where ``group_size`` is larger.
        """
        self._prepare, self._join, self._finish = prepare, join, finish
        self._group_size, self._read_ahead = group_size, max(read_ahead, group_size)

    def run(self, items: Iterable[Item]) -> Generator[tuple[Item, Future[Result]], None, None]:
        """Yield each item with its result to come, in order; a step's error is the result's.

        Items are taken in the thread of the caller. When the caller stops early, what runs is
        waited for, and the rest is dropped.

        Raises:
            SessionError: the process was forked meanwhile, and this is the child: the threads
                are not there.
        """
        readers, worker = ThreadPoolExecutor(self._read_ahead), ThreadPoolExecutor(1)
        pending: deque[tuple[Item, Future[Result]]] = deque()
        iterator = iter(items)
        try:
            while group := list(itertools.islice(iterator, self._group_size)):
                prepared = [readers.submit(self._prepare, item) for item in group]
                joined = worker.submit(self._join_ready, prepared)
                for item, ready in zip(group, prepared, strict=True):
                    pending.append((item, worker.submit(self._finish_one, ready, joined)))
                while len(pending) > self._read_ahead:
                    yield pending.popleft()
                    self.require_own_process()
            while pending:
                yield pending.popleft()
                self.require_own_process()
        finally:
            if not self.is_of_another_process:
                for pool in (worker, readers):
                    pool.shutdown(wait=False, cancel_futures=True)
                for pool in (worker, readers):
                    pool.shutdown()

    def _join_ready(self, prepared: list[Future[Ready]]) -> dict[Future[Ready], Ready]:
        """Join what could be prepared; what could not raises its error in ``_finish_one``."""
        ready = [future for future in prepared if future.exception() is None]
        if not ready:
            return {}
        return dict(zip(ready, self._join([f.result() for f in ready]), strict=True))

    def _finish_one(
        self, ready: Future[Ready], joined: Future[dict[Future[Ready], Ready]]
    ) -> Result:
        ready.result()
        return self._finish(joined.result()[ready])
