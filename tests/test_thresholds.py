"""Each method finds the known best threshold."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

from tap_deploy.engines.calibration.histogram import MagnitudeHistogram
from tap_deploy.engines.calibration.thresholds import (
    LEVELS,
    clipping_error,
    percentile_threshold,
    squared_error,
    threshold,
)
from tap_deploy.errors import InputError
from tap_deploy.precisions import CALIBRATION_METHODS

COUNT = 200_000
QUANTILES = (np.arange(COUNT) + 0.5) / COUNT


def histogram_of(values):
    histogram = MagnitudeHistogram()
    histogram.add(np.asarray(values, np.float32))
    return histogram


def gaussian():
    rng = np.random.default_rng(0)
    return rng.normal(size=COUNT).astype(np.float32)


def with_outliers(values, magnitude, count=4):
    return np.concatenate([values, np.full(count, magnitude, np.float32)])


def brute_force_error(values, amax):
    step = np.float64(amax) / LEVELS
    rounded = np.clip(np.rint(values / step), -LEVELS, LEVELS) * step
    return float(np.square(values - rounded, dtype=np.float64).sum())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_a_uniform_distribution_is_not_clipped(scale):
    histogram = histogram_of(scale * QUANTILES)
    amax = float(np.float32(scale * QUANTILES[-1]))
    assert threshold(histogram, "max") == amax
    assert threshold(histogram, "entropy") == pytest.approx(amax, rel=1e-3)
    assert threshold(histogram, "percentile") == pytest.approx(0.9999 * scale, rel=1e-4)
    # Clipping costs (1 - t)^3 / 3, rounding t^2 / (12 * 127^2): the sum is smallest at
    # (1 - t)^2 = t / (6 * 127^2).
    best = 1 - 1 / (LEVELS * 6**0.5)
    assert threshold(histogram, "mse") == pytest.approx(best * amax, rel=2e-3)


def test_percentile_of_an_exponential_distribution():
    histogram = histogram_of(-np.log(1 - QUANTILES))
    assert threshold(histogram, "percentile") == pytest.approx(-np.log(1e-4), rel=3e-3)
    assert percentile_threshold(histogram, 50) == pytest.approx(np.log(2), rel=1e-3)


def test_percentile_counts_zeros():
    values = np.concatenate([np.zeros(90), np.linspace(1, 2, 10)])
    assert percentile_threshold(histogram_of(values), 95) == pytest.approx(1.5, 0.1)


def test_mse_of_a_laplace_distribution():
    # 2 exp(-t) is lost by clipping, t^2 / (12 * 127^2) by rounding: exp(-t) = t / (12 * 127^2).
    best = 10.0
    for _ in range(50):
        best = -np.log(best / (12 * LEVELS**2))
    histogram = histogram_of(-np.log(1 - QUANTILES))
    assert threshold(histogram, "mse") == pytest.approx(best, rel=0.02)


@pytest.mark.parametrize("magnitude", [5.0, 12.0, 60.0])
def test_mse_is_the_best_of_all_thresholds(magnitude):
    values = with_outliers(gaussian(), magnitude)
    candidates = np.linspace(0.02, 1.0, 99) * np.abs(values).max()
    best = min(brute_force_error(values, amax) for amax in candidates)
    found = threshold(histogram_of(values), "mse")
    assert brute_force_error(values, found) < 1.01 * best


@pytest.mark.parametrize("amax", [0.5, 3.0, 4.9, 60.0])
def test_the_error_is_that_of_the_values(amax):
    values = with_outliers(gaussian(), 60.0)
    expected = brute_force_error(values, amax)
    assert squared_error(histogram_of(values), amax) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("amax", [0.5, 3.0, 40.0])
def test_clipping_is_the_error_of_what_lies_above(amax):
    values = np.abs(with_outliers(gaussian(), 60.0)).astype(np.float64)
    expected = float(np.square(values[values > amax] - amax).sum())
    histogram = histogram_of(values)
    assert clipping_error(histogram, amax) == pytest.approx(expected, rel=0.02)
    assert clipping_error(histogram, amax) <= squared_error(histogram, amax)


def gelu(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def test_rare_large_values_that_carry_the_signal():
    """Most of what a GELU makes is next to 0, most of its energy is not: mse keeps that, entropy,
    which counts values and not energy, clips it. Hence the default."""
    rng = np.random.default_rng(0)
    values = gelu(np.concatenate([rng.normal(-2, 1, COUNT), rng.uniform(0, 12, COUNT // 1000)]))
    amax = np.abs(values).max()
    found = {method: threshold(histogram_of(values), method) for method in ("mse", "entropy")}
    assert found["mse"] > 0.8 * amax > found["entropy"]
    noise = {method: brute_force_error(values, found[method]) for method in found}
    assert noise["entropy"] > 10 * noise["mse"]


@pytest.mark.parametrize("magnitude", [50.0, 1000.0])
def test_far_outliers_are_clipped(magnitude):
    # Quantiles of the logistic distribution: drawn values would add a divergence of their own.
    histogram = histogram_of(with_outliers(np.log((1 + QUANTILES) / (1 - QUANTILES)), magnitude))
    assert threshold(histogram, "max") == magnitude
    assert 6.0 < threshold(histogram, "entropy") < 13.0
    assert 9.5 < threshold(histogram, "percentile") < 10.5


def test_entropy_finds_the_step_that_fits():
    """128 even levels of random mass up to 1: int8 with amax 1 loses nothing but the outliers."""
    rng = np.random.default_rng(0)
    level = rng.choice(128, size=COUNT, p=rng.dirichlet(np.full(128, 0.5)))
    values = (level + rng.uniform(0, 1, COUNT)) / 128
    histogram = histogram_of(with_outliers(values, 4.0, 20))
    assert threshold(histogram, "entropy") == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("method", CALIBRATION_METHODS)
def test_units_do_not_matter(method):
    values = with_outliers(gaussian(), 20.0)
    assert threshold(histogram_of(values * 1024), method) == pytest.approx(
        1024 * threshold(histogram_of(values), method), rel=1e-6
    )


@pytest.mark.parametrize("method", CALIBRATION_METHODS)
def test_nothing_but_zeros(method):
    assert threshold(histogram_of(np.zeros(5)), method) == 0.0


@pytest.mark.parametrize("method", CALIBRATION_METHODS)
def test_a_single_magnitude_is_kept(method):
    assert threshold(histogram_of(np.full(1000, 3.0)), method) == pytest.approx(3.0, rel=0.01)


def test_unknown_method():
    with pytest.raises(InputError, match="unknown method 'best'"):
        threshold(histogram_of([1.0]), "best")
