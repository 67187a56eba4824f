"""Magnitudes are counted exactly, in any order, in the same memory."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

from tap_deploy.engines.calibration.histogram import CHUNK_VALUES, MagnitudeHistogram


def histogram_of(*parts):
    histogram = MagnitudeHistogram()
    for part in parts:
        histogram.add(np.asarray(part, np.float32))
    return histogram


def same(a, b):
    return a.to_arrays().keys() == b.to_arrays().keys() and all(
        np.array_equal(value, b.to_arrays()[key]) for key, value in a.to_arrays().items()
    )


def test_counts_are_those_of_numpy():
    values = np.random.default_rng(0).normal(size=(7, 11, 13)).astype(np.float32)
    histogram = histogram_of(values)
    edges = histogram.edges
    assert edges[-1] / 2 <= np.abs(values).max() < edges[-1]
    expected, _ = np.histogram(np.abs(values).astype(np.float64), bins=edges)
    np.testing.assert_array_equal(histogram.counts, expected)
    assert histogram.amax == np.abs(values).max()


def test_order_and_batches_do_not_matter():
    rng = np.random.default_rng(1)
    parts = [rng.normal(size=n) * scale for n, scale in [(50, 1e-6), (400, 3.0), (9, 1e4), (1, 1)]]
    growing = histogram_of(*parts)
    assert same(growing, histogram_of(*reversed(parts)))
    assert same(growing, histogram_of(np.concatenate(parts)))


def test_long_tensors_are_taken_in_pieces():
    values = np.ones(CHUNK_VALUES + 5)
    values[-1] = 8.0
    assert histogram_of(values).counts.sum() == values.size


def test_memory_does_not_grow():
    histogram = histogram_of([1.0])
    size = sum(array.nbytes for array in histogram.to_arrays().values())
    for _ in range(50):
        histogram.add(np.random.default_rng(0).normal(size=1000).astype(np.float32))
    assert sum(array.nbytes for array in histogram.to_arrays().values()) == size
    assert len(vars(histogram)) == 5


def test_zeros_and_bad_values_are_in_no_bin():
    histogram = histogram_of([0.0, -0.0, 2.0, np.nan, -np.inf])
    assert (histogram.zeros, histogram.bad_values, histogram.counts.sum()) == (2, 2, 1)
    assert histogram.amax == 2.0
    assert histogram.total == 3


def test_a_power_of_two_falls_into_its_own_bin():
    histogram = histogram_of([1.0, 0.5])
    assert histogram.edges[np.flatnonzero(histogram.counts)].tolist() == [0.5, 1.0]


def test_bins_are_narrow_beside_huge_values():
    histogram = histogram_of([1.0, 1.001, 1e4])
    assert len(np.flatnonzero(histogram.counts)) == 3
    width = np.diff(histogram.edges) / histogram.edges[:-1]
    assert width.max() == 1 / 1024


def test_what_falls_out_of_the_window_joins_the_zeros():
    histogram = histogram_of([1e-3, 1.0], [1e6])
    assert (histogram.zeros, histogram.counts.sum()) == (1, 2)


def test_tiny_values_are_told_apart():
    for magnitude in (1e-25, 1e-37, 1e-40):  # the last one is no normal number
        histogram = histogram_of([0.0, magnitude, 2 * magnitude])
        assert len(np.flatnonzero(histogram.counts)) == 2
        assert histogram.zeros == 1


def test_arrays_bring_it_back():
    histogram = histogram_of([0.0, 0.25, 7.0, np.inf])
    again = MagnitudeHistogram.from_arrays(histogram.to_arrays())
    assert same(again, histogram)
    again.add(np.array([100.0], np.float32))
    assert not same(again, histogram)
