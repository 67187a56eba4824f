"""Pipelined processing of a stream of items in threads."""

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
    """Runs three steps per item; steps of different items overlap.

    ``prepare`` runs in one thread per item read ahead. ``join``, which takes a group of items, and
    ``finish`` run in one more thread, in the order of the items.
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
        """Store the steps.

        Args:
            prepare: first step, per item.
            join: second step, on a group of up to ``group_size`` prepared items.
            finish: third step, per item; returns the result.
            group_size: items per call of ``join``.
            read_ahead: items taken in advance of the yielded one; at least ``group_size``.
        """
        self._prepare, self._join, self._finish = prepare, join, finish
        self._group_size, self._read_ahead = group_size, max(read_ahead, group_size)

    def run(self, items: Iterable[Item]) -> Generator[tuple[Item, Future[Result]], None, None]:
        """Yield each item with the future of its result, in order; the future carries errors.

        Items are taken in the caller's thread. If the caller stops early, running steps are
        awaited and pending ones cancelled.

        Raises:
            SessionError: the process was forked since, and this is the child, which does not have
                the threads.
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
        """Join the items that were prepared; ``_finish_one`` raises the errors of the others."""
        ready = [future for future in prepared if future.exception() is None]
        if not ready:
            return {}
        return dict(zip(ready, self._join([f.result() for f in ready]), strict=True))

    def _finish_one(
        self, ready: Future[Ready], joined: Future[dict[Future[Ready], Ready]]
    ) -> Result:
        ready.result()
        return self._finish(joined.result()[ready])
