"""Choice of the int8 clipping threshold of a tensor from its histogram."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tap_deploy.engines.calibration.histogram import MagnitudeHistogram
from tap_deploy.errors import InputError
from tap_deploy.precisions import CALIBRATION_METHODS

LEVELS = 127  # symmetric int8, without -128
PERCENTILE = 99.99

# mse and entropy try thresholds in this many octaves below amax.
SEARCH_OCTAVES = 10
MSE_PER_OCTAVE, MSE_REFINEMENT = 8, 33
ENTROPY_PER_OCTAVE = 16
ENTROPY_LEVELS, BINS_PER_LEVEL = 128, 4  # magnitudes 0 to 127
EMPTY = 1e-9  # replaces a probability of 0, for which the divergence would be infinite

Floats = npt.NDArray[np.float64]


def threshold(histogram: MagnitudeHistogram, method: str) -> float:
    """Return amax: larger magnitudes are clipped, and the int8 scale is amax / 127.

    ``max`` clips nothing. ``percentile`` keeps 99.99 % of all values. ``mse`` minimises the mean
    squared quantization error. ``entropy`` minimises the KL divergence between the distributions
    of the values and of their quantized values.

    Args:
        histogram: histogram of the tensor.
        method: one of ``precisions.CALIBRATION_METHODS``.

    Raises:
        InputError: unknown method.
    """
    if method not in CALIBRATION_METHODS:
        raise InputError(
            f"unknown method {method!r}; expected one of {', '.join(CALIBRATION_METHODS)}"
        )
    if not histogram.counts.any():  # zeros only
        return 0.0
    if method == "percentile":
        return percentile_threshold(histogram, PERCENTILE)
    return _CHOOSERS[method](histogram)


def percentile_threshold(histogram: MagnitudeHistogram, percentile: float) -> float:
    """Return the magnitude at a percentile of all values, including zeros."""
    wanted = percentile / 100 * histogram.total - histogram.zeros
    cumulative = np.concatenate([[0], np.cumsum(histogram.counts)])
    place = max(0, int(np.searchsorted(cumulative, wanted)) - 1)
    inside = np.clip((wanted - cumulative[place]) / max(1, histogram.counts[place]), 0.0, 1.0)
    low, high = histogram.edges[place : place + 2]
    return min(histogram.amax, float(low + inside * (high - low)))


def mse_threshold(histogram: MagnitudeHistogram) -> float:
    """Return the threshold up to amax with the smallest mean squared quantization error.

    Searches a coarse grid, and then a fine one around the best candidate.
    """
    coarse = _candidates(histogram, MSE_PER_OCTAVE)
    place = _argmin_error(histogram, coarse)
    low, high = coarse[min(place + 1, len(coarse) - 1)], coarse[max(place - 1, 0)]
    fine = np.linspace(high, low, MSE_REFINEMENT)
    return float(fine[_argmin_error(histogram, fine)])


def clipping_error(histogram: MagnitudeHistogram, amax: float) -> float:
    """Return the contribution of clipped values to ``squared_error``."""
    edges = histogram.edges
    first = max(0, int(np.searchsorted(edges, amax, side="right")) - 1)
    integral = np.maximum(edges[first:] - amax, 0.0) ** 3 / 3
    share = histogram.counts[first:] / np.diff(edges[first:])
    return float((np.diff(integral) * share).sum())


def squared_error(histogram: MagnitudeHistogram, amax: float) -> float:
    """Return the sum of ``(x - int8(x)) ** 2`` over all values for a threshold.

    Assumes a uniform distribution within each bin and integrates the error in closed form. A bin
    can be as wide as an int8 step, so its centre would not represent its values.
    """
    used = np.flatnonzero(histogram.counts)
    integral = _error_integral(histogram.edges, amax)
    width = np.diff(histogram.edges)[used]
    return float((np.diff(integral)[used] * histogram.counts[used] / width).sum())


def entropy_threshold(histogram: MagnitudeHistogram) -> float:
    """Return the threshold with the smallest KL divergence; the largest one of equals."""
    cumulative = np.concatenate([[0], np.cumsum(histogram.counts)]).astype(np.float64)
    edges, candidates = histogram.edges, _candidates(histogram, ENTROPY_PER_OCTAVE)
    lost = [_divergence(edges, cumulative, float(amax)) for amax in candidates]
    return float(candidates[int(np.argmin(lost))])


def _candidates(histogram: MagnitudeHistogram, per_octave: int) -> Floats:
    """Return thresholds from amax down, ``per_octave`` in each octave, evenly spaced in log."""
    steps = np.arange(SEARCH_OCTAVES * per_octave + 1)
    candidates: Floats = histogram.amax * 2.0 ** (-steps / per_octave)
    return candidates


def _argmin_error(histogram: MagnitudeHistogram, candidates: Floats) -> int:
    """Return the index of the candidate with the smallest error; candidates must decrease."""
    errors: list[float] = []
    for amax in candidates.tolist():
        # The clipping error alone exceeds the best total, and it grows as the threshold decreases.
        if errors and clipping_error(histogram, amax) > min(errors):
            break
        errors.append(squared_error(histogram, amax))
    return int(np.argmin(errors))


def _error_integral(x: Floats, amax: float) -> Floats:
    """Return the integral of ``(t - int8(t)) ** 2`` over t from 0 to x."""
    step = amax / LEVELS
    inner = np.minimum(x, amax) / step
    whole = np.floor(inner + 0.5)
    rounded = step**3 * (whole / 12 + (inner - whole) ** 3 / 3)
    clipped = np.maximum(x - amax, 0.0) ** 3 / 3
    total: Floats = rounded + clipped
    return total


def _divergence(edges: Floats, cumulative: Floats, amax: float) -> float:
    """Return the KL divergence between values and quantized values for a threshold.

    P is the histogram up to the threshold, without zeros, with 4 bins per level for 128 levels; the
    last bin includes all clipped values. Q is the quantized distribution: the mass of each level,
    without clipped values, spread evenly over its non-empty bins. Other calibrators use bins of
    fixed width, and therefore more bins for higher thresholds; here every threshold has the same
    number of bins.
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
