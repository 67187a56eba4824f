"""Weights as int8 with a scale per output channel."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

LEVELS = 127  # int8 without -128: the same steps on both sides of zero
# Two products of a weight up to 64 and a uint8 fit into 16 bits, which is where CPUs without VNNI
# add them up; onnxruntime takes its quick kernel for such weights, and is exact.
REDUCED_LEVELS = 64
# A smaller scale is no normal number in the dtype, and hardware may take it for zero.
SMALLEST_SCALES = {"float16": 6.2e-5, "float32": 1.2e-38}


def scales_from_amax(
    amax: npt.ArrayLike, float_dtype: str, levels: int = LEVELS
) -> npt.NDArray[Any]:
    """Return the step of int8 for a range, in the dtype that the graph computes with.

    A step is never below the smallest normal number of the dtype, nor 0 where all values are 0.
    Rounding to float16 may make it smaller by a 2000th, so that the largest value is clipped by
    as much.

    Args:
        amax: largest magnitudes, any shape.
        float_dtype: ``float16`` or ``float32``.
        levels: steps on each side of zero.
    """
    scales = np.maximum(np.asarray(amax, np.float64) / levels, SMALLEST_SCALES[float_dtype])
    return scales.astype(float_dtype)


def quantized_weight(
    weight: npt.NDArray[np.floating[Any]],
    channel_axis: int,
    float_dtype: str,
    levels: int = LEVELS,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[Any]]:
    """Return a weight as int8, same shape, and the scales of its output channels [channels].

    The values are divided by the scales as the graph will have them, rounded to its dtype.

    Args:
        weight: float, any shape.
        channel_axis: axis of the output channels.
        float_dtype: ``float16`` or ``float32``.
        levels: steps on each side of zero, 127 at most.
    """
    values = weight.astype(np.float32)
    others = tuple(axis for axis in range(values.ndim) if axis != channel_axis)
    scales = scales_from_amax(np.abs(values).max(axis=others), float_dtype, levels)
    shape = [1] * values.ndim
    shape[channel_axis] = -1
    steps = values / scales.astype(np.float32).reshape(shape)
    return np.clip(np.rint(steps), -levels, levels).astype(np.int8), scales
