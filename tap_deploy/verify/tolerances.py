"""How far an output may be from the reference, per precision and output, and why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from tap_deploy import graphs
from tap_deploy.bundle.precision_record import PrecisionRecord
from tap_deploy.errors import BundleError
from tap_deploy.precisions import FP16, FP32, INT8

CAPTION_IDS, MASK_INDEX = "caption_ids", "mask_index"
PROMPT_OUTPUTS = (
    graphs.LOW_RES_MASKS,
    graphs.IOU_PREDICTIONS,
    graphs.SEMANTIC_TOKENS,
    graphs.SEMANTIC_EMBEDDINGS,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What passes.

    Attributes:
        max: bound on the largest difference; 0 asks for equality.
        mean: bound on the mean difference, as a share of the mean magnitude; None for no bound.
        relative: ``max`` is a share of the largest magnitude of the expected tensor. For a
            choice (ids, mask index) it bounds the margin by which the other choice won.
    """

    max: float
    mean: float | None = None
    relative: bool = False


Tolerances = Mapping[str, Tolerance]

# Absolute. fp32 graphs differ from the reference by the order of their sums only.
FP32_TOLERANCE = 1e-3
FP32_TOLERANCES: Tolerances = {
    graphs.IMAGE_EMBEDDINGS: Tolerance(max=FP32_TOLERANCE),
    **{name: Tolerance(max=FP32_TOLERANCE) for name in PROMPT_OUTPUTS},
    graphs.LOGITS: Tolerance(max=FP32_TOLERANCE),
    CAPTION_IDS: Tolerance(max=0),
    MASK_INDEX: Tolerance(max=0),
}

# fp16 has 11 bits: storing a number moves it by up to this share of itself.
HALF_UNIT = 2.0**-11
# Roundings add up like a random walk: some tens of them along the residual stream make a few
# units on average, and the worst of millions of elements is a few times the average.
_MEAN, _MAX = 8 * HALF_UNIT, 20 * HALF_UNIT
_FP16 = Tolerance(max=_MAX, mean=_MEAN, relative=True)
# IoU predictions are a few small numbers, what is left of a sum of hundreds of larger products:
# the same rounding is a larger share of them.
_FP16_IOU = Tolerance(max=_MAX, mean=12 * HALF_UNIT, relative=True)
# Two candidates may each be off by the tolerance of their scores, in opposite directions.
_FP16_CHOICE = Tolerance(max=2 * _MAX, relative=True)
FP16_TOLERANCES: Tolerances = {
    graphs.IMAGE_EMBEDDINGS: _FP16,
    **{name: _FP16 for name in PROMPT_OUTPUTS},
    graphs.IOU_PREDICTIONS: _FP16_IOU,
    graphs.LOGITS: _FP16,
    CAPTION_IDS: _FP16_CHOICE,
    MASK_INDEX: _FP16_CHOICE,
}

TOLERANCES: Mapping[str, Tolerances] = {FP32: FP32_TOLERANCES, FP16: FP16_TOLERANCES}

# Rounding to int8 falls differently where the floats before it differ in their last bits, so two
# runtimes err by as much, but not alike: the largest of many errors may be some tenths larger.
INT8_SLACK = 2.0


def tolerances_for(precision: str, record: PrecisionRecord) -> Tolerances:
    """Return the tolerances of a precision.

    Those of int8 come from the bundle. How far int8 is from the reference depends on model and
    calibration, and whether that is fit for use is for the verdict to say, on real pictures. What
    golden samples can tell is whether a machine computes the int8 graph: then it is about as far
    from the reference as the graph was when it was made, on another runtime.

    Args:
        precision: one of ``precisions.PRECISIONS``.
        record: of the variant, see ``Manifest.precision_record``.

    Raises:
        BundleError: it is int8, and the bundle does not say how far its graphs are off.
    """
    if precision != INT8:
        return TOLERANCES[precision]
    deviation = _finite_deviation(record)
    if deviation is None:
        raise BundleError(
            "the bundle does not say how far its int8 graphs are off on the golden samples, so "
            "there is nothing to hold them against; make them again with: "
            "tap-export quantize BUNDLE --calibration-data FOLDER --force"
        )
    scores = {MASK_INDEX: graphs.IOU_PREDICTIONS, CAPTION_IDS: graphs.LOGITS}
    tolerances = {}
    for name, half in FP16_TOLERANCES.items():
        largest, mean = deviation[name]
        if name in scores:  # both candidates may be off, in opposite directions
            largest = max(largest, 2 * deviation[scores[name]][0])
        tolerances[name] = Tolerance(
            max=INT8_SLACK * largest + half.max,
            mean=None if half.mean is None else INT8_SLACK * mean + half.mean,
            relative=True,
        )
    return tolerances


def _finite_deviation(record: PrecisionRecord) -> dict[str, tuple[float, float]] | None:
    """Return output -> (max, mean) of the golden deviation; None if one is missing or infinite."""
    found = {
        name: (deviation.max, deviation.mean)
        for name, deviation in (record.golden_deviation or {}).items()
        if deviation.max is not None
        and deviation.mean is not None
        and math.isfinite(deviation.max)
        and math.isfinite(deviation.mean)
    }
    return found if found.keys() >= FP16_TOLERANCES.keys() else None
