"""Timing counts and summaries; real times are not tested."""

from __future__ import annotations

import time

import pytest

from tap_deploy.timing import PAUSE_SECONDS, Latency, Ratio, durations, measure


def test_candidates_take_turns():
    calls = []
    results = measure(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        min_iterations=5,
        min_seconds=0,
        warm_up_seconds=0,
    )
    assert calls == ["a", "b"] * 5
    assert {name: result.iterations for name, result in results.items()} == {"a": 5, "b": 5}


def test_the_first_calls_warm_up_and_do_not_count(monkeypatch):
    """A fake clock that advances by the duration of each call: first 1 s, then 10 ms."""
    now, calls = 0.0, []

    def call():
        nonlocal now
        now += 0.01 if calls else 1.0
        calls.append(now)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    found = measure({"a": call}, min_iterations=3, min_seconds=0, warm_up_seconds=1.025)["a"]
    assert len(calls) == 4 + 3  # 1 s and 3 times 10 ms to warm up
    assert (found.iterations, found.max_ms) == (3, pytest.approx(10))


def test_summary():
    latency = Latency.from_seconds([0.001 * i for i in range(1, 101)])
    assert latency.median_ms == pytest.approx(50.5)
    assert (latency.min_ms, latency.max_ms) == (1, 100)
    assert latency.p90_ms == pytest.approx(90.1)
    assert latency.is_noisy
    assert not Latency.from_seconds([1.0, 1.01, 0.99]).is_noisy


def test_percentiles_by_hand():
    latency = Latency.from_seconds([0.004, 0.001, 0.002, 0.003])
    assert (latency.min_ms, latency.mean_ms, latency.max_ms) == (1, pytest.approx(2.5), 4)
    assert latency.median_ms == pytest.approx(2.5)
    assert latency.p90_ms == pytest.approx(3.7)  # position 0.9 * 3 = 2.7 of the sorted durations
    assert latency.p95_ms == pytest.approx(3.85)
    assert latency.p99_ms == pytest.approx(3.97)
    assert latency.cv == pytest.approx(1.25**0.5 / 2.5)


def test_ratio_is_taken_pair_by_pair():
    """Load doubles both calls of a pair, and leaves the ratio as it is."""
    base = [1.0, 2.0, 4.0, 8.0]
    ratio = Ratio.of([3.0, 6.0, 12.0, 24.0], base)
    assert (ratio.pairs, ratio.median, ratio.low, ratio.high) == (4, 3, 3, 3)
    assert ratio.spread == 0
    ratio = Ratio.of([1.0, 4.0, 12.0, 32.0, 5.0], [1.0, 2.0, 4.0, 8.0, 1.0])  # 1, 2, 3, 4, 5
    assert (ratio.low, ratio.median, ratio.high) == (2, 3, 4)
    assert ratio.spread == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("ratios", "undecided"),
    [
        ([0.8, 1.0, 1.2], True),  # 0.9 to 1.1: too wide to say
        ([0.99, 1.0, 1.01], False),  # equally fast
        ([1.1, 1.5, 2.0], False),  # wide, but slower at any rate
    ],
)
def test_a_wide_range_around_1_is_undecided(ratios, undecided):
    assert Ratio.of(ratios, [1.0] * len(ratios)).is_undecided is undecided


def test_candidates_rest_before_their_turn(monkeypatch):
    """Threads of the previous candidate go to sleep first; one alone need not wait."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    options = {"min_iterations": 3, "min_seconds": 0, "warm_up_seconds": 0}
    measure({"a": lambda: None}, **options)
    assert slept == []
    measure({"a": lambda: None, "b": lambda: None}, **options)
    assert slept == [PAUSE_SECONDS] * 6


def test_durations_are_in_order_and_as_many_for_all(monkeypatch):
    now, done = 0.0, []

    def call(seconds):
        def run():
            nonlocal now
            now += next(seconds)

        return run

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    found = durations(
        {"a": call(iter([1.0, 2.0, 3.0])), "b": call(iter([10.0, 20.0, 30.0]))},
        min_iterations=1,
        min_seconds=6,
        warm_up_seconds=0,
        after_call=done.append,
    )
    assert found == {"a": [1, 2, 3], "b": [10, 20, 30]}  # a has 6 s only then
    assert done == ["a", "b"] * 3
