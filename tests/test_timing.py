"""Timing counts and summaries; real times are not tested."""

from __future__ import annotations

import time

import pytest

from tap_deploy.timing import Latency, measure


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
