"""The magnitude at which int8 shall clip, chosen from a histogram."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tap_deploy.engines.calibration.histogram import MagnitudeHistogram
from tap_deploy.errors import InputError
from tap_deploy.precisions import CALIBRATION_METHODS as METHODS

LEVELS = 127  # int8 without -128: symmetric
PERCENTILE = 99.99

# Thresholds that mse and entropy try go down from amax, this many octaves.
SEARCH_OCTAVES = 10
MSE_PER_OCTAVE, MSE_REFINEMENT = 8, 33
ENTROPY_PER_OCTAVE = 16
ENTROPY_LEVELS, BINS_PER_LEVEL = 128, 4  # magnitudes 0 to 127
EMPTY = 1e-9  # share that stands for none: a divergence from nothing would be infinite

Floats = npt.NDArray[np.float64]


def threshold(histogram: MagnitudeHistogram, method: str) -> float:
    """Return amax: magnitudes above it are clipped, the step of int8 is amax / 127.

    ``max`` clips nothing. ``percentile`` keeps 99.99 % of all values. ``mse`` makes the mean
    squared error of the int8 values smallest. ``entropy`` makes the information that is lost (KL
    divergence between the values and their int8 image) smallest.

    Args:
        histogram: of the tensor.
        method: one of ``METHODS``.

    Raises:
        InputError: no such method.
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    if not histogram.counts.any():  # zeros only
        return 0.0
    if method == "percentile":
        return percentile_threshold(histogram, PERCENTILE)
    return _CHOOSERS[method](histogram)


def percentile_threshold(histogram: MagnitudeHistogram, percentile: float) -> float:
    """Return the magnitude below which a share of all values lies, zeros among them."""
    wanted = percentile / 100 * histogram.total - histogram.zeros
    cumulative = np.concatenate([[0], np.cumsum(histogram.counts)])
    place = max(0, int(np.searchsorted(cumulative, wanted)) - 1)
    inside = np.clip((wanted - cumulative[place]) / max(1, histogram.counts[place]), 0.0, 1.0)
    low, high = histogram.edges[place : place + 2]
    return min(histogram.amax, float(low + inside * (high - low)))


def mse_threshold(histogram: MagnitudeHistogram) -> float:
    """Return the threshold with the smallest mean squared error, of candidates up to amax.

    A coarse search, then a finer one around the best.
    """
    coarse = _candidates(histogram, MSE_PER_OCTAVE)
    place = _argmin_error(histogram, coarse)
    low, high = coarse[min(place + 1, len(coarse) - 1)], coarse[max(place - 1, 0)]
    fine = np.linspace(high, low, MSE_REFINEMENT)
    return float(fine[_argmin_error(histogram, fine)])


def clipping_error(histogram: MagnitudeHistogram, amax: float) -> float:
    """Return the part of ``squared_error`` that values above the threshold have."""
    edges = histogram.edges
    first = max(0, int(np.searchsorted(edges, amax, side="right")) - 1)
    integral = np.maximum(edges[first:] - amax, 0.0) ** 3 / 3
    share = histogram.counts[first:] / np.diff(edges[first:])
    return float((np.diff(integral) * share).sum())


def squared_error(histogram: MagnitudeHistogram, amax: float) -> float:
    """Return the sum of ``(x - int8(x)) ** 2`` over all values, at a threshold.

    Values are spread evenly over their bin and the error is integrated in closed form: a bin may
    be as wide as a step, and its centre would then speak for none of its values.
    """
    used = np.flatnonzero(histogram.counts)
    integral = _error_integral(histogram.edges, amax)
    width = np.diff(histogram.edges)[used]
    return float((np.diff(integral)[used] * histogram.counts[used] / width).sum())


def entropy_threshold(histogram: MagnitudeHistogram) -> float:
    """Return the threshold whose int8 image loses the least information; the largest of equals."""
    cumulative = np.concatenate([[0], np.cumsum(histogram.counts)]).astype(np.float64)
    edges, candidates = histogram.edges, _candidates(histogram, ENTROPY_PER_OCTAVE)
    lost = [_divergence(edges, cumulative, float(amax)) for amax in candidates]
    return float(candidates[int(np.argmin(lost))])


def _candidates(histogram: MagnitudeHistogram, per_octave: int) -> Floats:
    """Thresholds from amax down, an even number of them in each octave."""
    steps = np.arange(SEARCH_OCTAVES * per_octave + 1)
    candidates: Floats = histogram.amax * 2.0 ** (-steps / per_octave)
    return candidates


def _argmin_error(histogram: MagnitudeHistogram, candidates: Floats) -> int:
    """Return which of the candidates, which fall, has the smallest error."""
    errors: list[float] = []
    for amax in candidates.tolist():
        # Below, clipping alone costs more than all of the best does: it only grows from here.
        if errors and clipping_error(histogram, amax) > min(errors):
            break
        errors.append(squared_error(histogram, amax))
    return int(np.argmin(errors))


def _error_integral(x: Floats, amax: float) -> Floats:
    """Integral of ``(t - int8(t)) ** 2`` over t from 0 to x."""
    step = amax / LEVELS
    inner = np.minimum(x, amax) / step
    whole = np.floor(inner + 0.5)
    rounded = step**3 * (whole / 12 + (inner - whole) ** 3 / 3)
    clipped = np.maximum(x - amax, 0.0) ** 3 / 3
    total: Floats = rounded + clipped
    return total


def _divergence(edges: Floats, cumulative: Floats, amax: float) -> float:
    """KL divergence of the values from their int8 image, at a threshold.

    P is the histogram up to the threshold, without the zeros, in 4 bins for each of 128 levels,
    with all that is clipped in its last bin. Q is what int8 can tell of it: the mass of each level,
    spread evenly over its bins that are not empty; of what was clipped it knows nothing. Other
    calibrators have bins of a fixed width, and so more of them for higher thresholds; here all
    thresholds are compared at the same number of bins.
    """
    bins = np.linspace(0.0, amax, ENTROPY_LEVELS * BINS_PER_LEVEL + 1)
    kept = np.diff(np.interp(bins, edges, cumulative)).reshape(ENTROPY_LEVELS, BINS_PER_LEVEL)
    filled = kept > 0
    spread = kept.sum(axis=1, keepdims=True) / np.maximum(filled.sum(axis=1, keepdims=True), 1)
    q = np.where(filled, spread, 0.0)
    p = kept.copy()
    p[-1, -1] += cumulative[-1] - kept.sum()
    total = kept.sum()
    if total <= 0:
        return float("inf")
    used = p > 0
    p, q = p[used] / p.sum(), np.maximum(q[used] / total, EMPTY)
    return float((p * np.log(p / q)).sum())


def _largest(histogram: MagnitudeHistogram) -> float:
    return histogram.amax


_CHOOSERS: dict[str, Callable[[MagnitudeHistogram], float]] = {
    "max": _largest,
    "entropy": entropy_threshold,
    "mse": mse_threshold,
}
