"""The magnitude at which int8 shall clip, chosen from a histogram."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tap_deploy.engines.histogram import NUM_BINS, MagnitudeHistogram
from tap_deploy.errors import InputError
from tap_deploy.precisions import CALIBRATION_METHODS as METHODS

LEVELS = 127  # int8 without -128: symmetric
DEFAULT_PERCENTILE = 99.99
ENTROPY_BINS = 2048
ENTROPY_LEVELS = 128  # magnitudes 0 to 127
NUM_CANDIDATES = 41
SMALLEST_FRACTION = 1 / 64  # of the largest magnitude: the smallest threshold that mse tries

Floats = npt.NDArray[np.float64]


def threshold(
    histogram: MagnitudeHistogram, method: str, *, percentile: float = DEFAULT_PERCENTILE
) -> float:
    """Return amax: magnitudes above it are clipped, the step of int8 is amax / 127.

    ``max`` clips nothing. ``percentile`` keeps that share of all values. ``mse`` makes the mean
    squared error of the int8 values smallest. ``entropy`` makes the information that is lost (KL
    divergence between the values and their int8 image) smallest.

    Args:
        histogram: of the tensor.
        method: one of ``METHODS``.
        percentile: for that method, above 0 and at most 100.

    Raises:
        InputError: no such method, or another percentile.
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    if not 0 < percentile <= 100:
        raise InputError(f"percentile is {percentile}; expected above 0 and at most 100")
    if histogram.amax == 0:
        return 0.0
    if method == "percentile":
        return percentile_threshold(histogram, percentile)
    return _CHOOSERS[method](histogram)


def percentile_threshold(histogram: MagnitudeHistogram, percentile: float) -> float:
    """Return the magnitude below which a share of all values lies, zeros among them."""
    wanted = percentile / 100 * histogram.total - histogram.zeros
    cumulative = np.cumsum(histogram.counts)
    place = int(np.searchsorted(cumulative, wanted))
    if place >= NUM_BINS:
        return histogram.amax
    below = cumulative[place] - histogram.counts[place]
    inside = np.clip((wanted - below) / max(1, int(histogram.counts[place])), 0.0, 1.0)
    return min(histogram.amax, float(place + inside) * histogram.bin_width)


def mse_threshold(histogram: MagnitudeHistogram) -> float:
    """Return the threshold with the smallest mean squared error, of candidates up to amax.

    A coarse search, then a finer one around the best: the error falls, and rises again.
    """
    coarse = np.geomspace(SMALLEST_FRACTION, 1.0, NUM_CANDIDATES) * histogram.amax
    place = _best(histogram, coarse)
    low, high = coarse[max(place - 1, 0)], coarse[min(place + 1, NUM_CANDIDATES - 1)]
    fine = np.linspace(low, high, NUM_CANDIDATES)
    return min(histogram.amax, float(fine[_best(histogram, fine)]))


def _best(histogram: MagnitudeHistogram, candidates: Floats) -> int:
    return int(np.argmin([squared_error(histogram, float(amax)) for amax in candidates]))


def squared_error(histogram: MagnitudeHistogram, amax: float) -> float:
    """Return the sum of ``(x - int8(x)) ** 2`` over all values, at a threshold.

    Values are spread evenly over their bin and the error is integrated in closed form: near a
    small threshold a bin is as wide as a step, and its centre would speak for none of its values.
    """
    used = np.flatnonzero(histogram.counts)
    edges: Floats = np.stack([used, used + 1]) * np.float64(histogram.bin_width)  # [2, bins]
    low, high = _error_integral(edges, amax)
    return float(((high - low) * histogram.counts[used]).sum() / histogram.bin_width)


def _error_integral(x: Floats, amax: float) -> Floats:
    """Integral of ``(t - int8(t)) ** 2`` over t from 0 to x."""
    step = amax / LEVELS
    inner = np.minimum(x, amax) / step
    whole = np.floor(inner + 0.5)
    rounded = step**3 * (whole / 12 + (inner - whole) ** 3 / 3)
    clipped = np.maximum(x - amax, 0.0) ** 3 / 3
    total: Floats = rounded + clipped
    return total


def entropy_threshold(histogram: MagnitudeHistogram) -> float:
    """Return the threshold whose int8 image loses the least information.

    For every candidate, P is the histogram up to it with all that is clipped in its last bin, and
    Q the same bins after they were merged to 128 levels and spread out again over the bins that
    are not empty. The candidate with the smallest KL divergence of P from Q wins, the largest of
    equals.
    """
    width = histogram.amax / ENTROPY_BINS
    counts = _resampled(histogram, width)
    best, best_divergence = ENTROPY_BINS, math.inf
    for bins in range(ENTROPY_BINS, ENTROPY_LEVELS - 1, -8):
        divergence = _divergence(counts, bins)
        if divergence < best_divergence:
            best, best_divergence = bins, divergence
    return min(histogram.amax, best * width)


def _resampled(histogram: MagnitudeHistogram, width: float) -> Floats:
    """Counts in ``ENTROPY_BINS`` bins over [0, amax]; a bin on an edge is shared."""
    edges = np.arange(ENTROPY_BINS + 1) * width / histogram.bin_width
    cumulative = np.concatenate([[0.0], np.cumsum(histogram.counts)])
    counts: Floats = np.diff(np.interp(edges, np.arange(NUM_BINS + 1), cumulative))
    counts[-1] += cumulative[-1] - np.interp(edges[-1], np.arange(NUM_BINS + 1), cumulative)
    return counts


def _divergence(counts: Floats, bins: int) -> float:
    kept = counts[:bins]
    clipped = float(counts[bins:].sum())
    level = np.arange(bins) * ENTROPY_LEVELS // bins
    filled = kept > 0
    mass = np.bincount(level, kept, ENTROPY_LEVELS)
    spread = np.bincount(level, filled, ENTROPY_LEVELS)
    q = np.where(filled, (mass / np.maximum(spread, 1))[level], 0.0)
    p = kept.copy()
    p[-1] += clipped
    if not q[-1] and p[-1]:
        return math.inf  # what is clipped has no image
    used = p > 0
    p, q = p[used] / p.sum(), q[used] / q.sum()
    return float((p * np.log(p / q)).sum())


def _largest(histogram: MagnitudeHistogram) -> float:
    return histogram.amax


_CHOOSERS: dict[str, Callable[[MagnitudeHistogram], float]] = {
    "max": _largest,
    "entropy": entropy_threshold,
    "mse": mse_threshold,
}
