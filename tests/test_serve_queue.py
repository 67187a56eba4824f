"""The queue of graph calls: order, sharing, cancelling, closing."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import pytest

pytest.importorskip("fastapi")

from tap_deploy.server.work import Work, WorkQueue


def work(key, rows=1):
    return Work(stage="", run=lambda predictor, batch: batch, key=key, rows=rows, values=None)


def filled(works, *, max_rows=4, max_wait_s=0.0, pending=9):
    queue = WorkQueue(max_rows=max_rows, max_wait_s=max_wait_s, pending=lambda: pending)
    for one in works:
        queue.put(one)
    return queue


def test_works_of_one_key_are_taken_together_and_others_keep_their_order():
    works = [work("a"), work("b"), work("a"), work(None), work("b"), work(None)]
    queue = filled(works)
    taken = [queue.take() for _ in range(4)]
    assert taken == [[works[0], works[2]], [works[1], works[4]], [works[3]], [works[5]]]


def test_a_batch_takes_what_fits():
    works = [work("a", 2), work("a", 3), work("a", 2), work("a", 9)]
    queue = filled(works)
    assert [queue.take() for _ in range(3)] == [[works[0], works[2]], [works[1]], [works[3]]]


def test_cancelled_works_are_dropped():
    works = [work("a"), work("a"), work("a")]
    queue = filled(works)
    assert works[0].future.cancel() and works[2].future.cancel()
    assert queue.take() == [works[1]]
    assert not works[1].future.cancel()  # it is running


def test_discarded_works_are_not_kept():
    works = [work("a"), work("b")]
    queue = filled(works)
    queue.discard(works[0])
    assert works[0].future.cancelled() and list(queue._waiting) == [works[1]]
    assert queue.take() == [works[1]]
    queue.discard(works[1])  # it runs: nothing to remove
    assert not works[1].future.cancelled()


def test_the_first_waits_for_others():
    first, second, other = work("a"), work("a"), work("b")
    queue = filled([first], max_rows=2, max_wait_s=60.0)
    taken = []
    thread = threading.Thread(target=lambda: taken.append(queue.take()))
    thread.start()
    queue.put(other)
    queue.put(second)  # the batch is full now
    thread.join(30)
    assert taken == [[first, second]]


def test_nobody_waits_for_requests_that_are_not_there():
    works = [work("a"), work("a")]
    assert filled(works, max_wait_s=600.0, pending=2).take() == works


def test_it_waits_no_longer_than_it_may():
    late = work("a")
    queue = filled([late], max_wait_s=0.05)
    start = time.monotonic()
    assert queue.take() == [late]
    assert time.monotonic() - late.arrived >= 0.05 and time.monotonic() - start < 30


def test_closing():
    waiting = work("a")
    queue = filled([waiting])
    results = []
    queue.close()
    thread = threading.Thread(target=lambda: results.append(queue.take()))
    thread.start()
    thread.join(30)
    assert results == [None]
    late = work("a")
    queue.put(late)
    for one in (waiting, late):
        with pytest.raises(CancelledError):
            one.future.result(0)
