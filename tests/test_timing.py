"""Timing counts and summarises; what the clock says is not tested."""

from __future__ import annotations

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


def test_summary():
    latency = Latency.from_seconds([0.001 * i for i in range(1, 101)])
    assert latency.median_ms == pytest.approx(50.5)
    assert (latency.min_ms, latency.max_ms) == (1, 100)
    assert latency.p90_ms == pytest.approx(90.1)
    assert latency.is_noisy
    assert not Latency.from_seconds([1.0, 1.01, 0.99]).is_noisy
