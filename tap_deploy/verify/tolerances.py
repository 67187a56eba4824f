"""Tolerances per precision and output, with their derivation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from tap_deploy import graphs
from tap_deploy.bundle.precision_record import PrecisionRecord
from tap_deploy.errors import BundleError
from tap_deploy.precisions import BF16, FP16, FP32, INT8, INT8_BF16

CAPTION_IDS, MASK_INDEX = "caption_ids", "mask_index"
PROMPT_OUTPUTS = (
    graphs.LOW_RES_MASKS,
    graphs.IOU_PREDICTIONS,
    graphs.SEMANTIC_TOKENS,
    graphs.SEMANTIC_EMBEDDINGS,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Bounds on the difference between an output and its expected value.

    Attributes:
        max: bound on the largest difference; 0 requires equality. For a choice (ids, mask index),
            bound on the score margin.
        mean: bound on the mean difference over the mean magnitude; None for no bound.
        relative: whether ``max`` is relative to the largest magnitude of the expected tensor (of
            the scores, for a choice).
    """

    max: float
    mean: float | None = None
    relative: bool = False

    def times(self, factor: float) -> Tolerance:
        """Return these bounds times a factor."""
        mean = None if self.mean is None else factor * self.mean
        return dataclasses.replace(self, max=factor * self.max, mean=mean)


Tolerances = Mapping[str, Tolerance]

# fp32 graphs differ from the reference only by the order of summation. Measured with tap_demo,
# tap_vit_b and the test model, with onnxruntime and OpenVINO on x86 and with onnxruntime's CUDA
# provider on an H200: at most 2.8e-6 of the largest magnitude, and 2.6e-6 of the mean one.
FP32_LARGEST, FP32_MEAN = 2e-5, 1e-5
_FP32 = Tolerance(max=FP32_LARGEST, mean=FP32_MEAN, relative=True)
# Only two scores that are as close as that may change places.
_FP32_CHOICE = Tolerance(max=2 * FP32_LARGEST, relative=True)
FP32_TOLERANCES: Tolerances = {
    graphs.IMAGE_EMBEDDINGS: _FP32,
    **{name: _FP32 for name in PROMPT_OUTPUTS},
    graphs.LOGITS: _FP32,
    CAPTION_IDS: _FP32_CHOICE,
    MASK_INDEX: _FP32_CHOICE,
}
# TensorRT was never measured in fp32. It fuses more, and so sums in more orders.
ENGINE_FACTOR = 10
# A graph may enlarge the error that comes in: by 1.3 at most on tap_demo and tap_vit_b.
CHAIN_FACTOR = 4

# Largest relative rounding errors of fp16 and bf16, whose significands have 11 and 8 bits.
HALF_UNIT, BF16_UNIT = 2.0**-11, 2.0**-8


def _of_rounding(mean: float, largest: float) -> dict[str, Tolerance]:
    """Return the tolerances of graphs with a mean and a largest rounding error, relative.

    Rounding errors add up like a random walk: some tens of them along the residual stream give a
    few units on average, and the worst of millions of elements is a few times the average.
    """
    each = Tolerance(max=largest, mean=mean, relative=True)
    # The scores of two candidates may err by their tolerance in opposite directions.
    choice = Tolerance(max=2 * largest, relative=True)
    return {
        graphs.IMAGE_EMBEDDINGS: each,
        **{name: each for name in PROMPT_OUTPUTS},
        # IoU predictions are few and small, the result of cancellation in a sum of hundreds of
        # larger products, so the same rounding error is relatively larger.
        graphs.IOU_PREDICTIONS: Tolerance(max=largest, mean=1.5 * mean, relative=True),
        graphs.LOGITS: each,
        CAPTION_IDS: choice,
        MASK_INDEX: choice,
    }


FP16_TOLERANCES: Tolerances = _of_rounding(8 * HALF_UNIT, 20 * HALF_UNIT)
# Twice the largest errors that tap_vit_b and tap_demo had: 3 units on average, 4.8 at most. Fewer
# than in fp16, because sums and much of the residual stream stay fp32. The text decoder computes in
# fp32, on tokens that were computed in bf16.
BF16_TOLERANCES: Tolerances = _of_rounding(6 * BF16_UNIT, 10 * BF16_UNIT) | {
    graphs.LOGITS: FP32_TOLERANCES[graphs.LOGITS]
}

TOLERANCES: Mapping[str, Tolerances] = {
    FP32: FP32_TOLERANCES,
    FP16: FP16_TOLERANCES,
    BF16: BF16_TOLERANCES,
}

# The tolerances bound the error of one graph. How the errors of graphs in a chain add up depends on
# model and picture, so it is only measured.
_MEASURED = Tolerance(max=math.inf, relative=True)


def chained_tolerances(precision: str, tolerances: Tolerances) -> Tolerances:
    """Return the tolerances of graphs in a chain; captions keep theirs.

    Args:
        precision: one of ``precisions.RUN_PRECISIONS``.
        tolerances: those of each graph with the reference's inputs.
    """
    if precision == FP32:
        return {name: bound.times(CHAIN_FACTOR) for name, bound in tolerances.items()}
    measured = dict.fromkeys(tolerances, _MEASURED)
    return measured | {CAPTION_IDS: tolerances[CAPTION_IDS]}


# Floats that differ in their last bits can round to different int8 values. Two runtimes therefore
# have errors of the same size but not the same errors, and the largest of many may be some tenths
# larger.
INT8_SLACK = 2.0


def tolerances_for(
    precision: str, record: PrecisionRecord, *, in_tensorrt: bool = False
) -> Tolerances:
    """Return the tolerances of a precision.

    Those of int8 come from the bundle. The deviation of int8 from the reference depends on model
    and calibration; whether it is acceptable is decided by the verdict on real pictures. Golden
    samples only show whether a machine computes the int8 graph correctly: its deviation must be
    about that of the quantized graph when it was created, on another runtime.

    Args:
        precision: one of ``precisions.RUN_PRECISIONS``.
        record: record of the variant, see ``Manifest.precision_record``.
        in_tensorrt: whether TensorRT runs the graphs.

    Raises:
        BundleError: int8, and the bundle has no recorded deviations.
    """
    if precision == FP32 and in_tensorrt:
        return {name: bound.times(ENGINE_FACTOR) for name, bound in FP32_TOLERANCES.items()}
    if precision not in (INT8, INT8_BF16):
        return TOLERANCES[precision]
    deviation = _finite_deviation(record)
    if deviation is None:
        raise BundleError(
            "the bundle has no deviations of its int8 graphs on the golden samples, from which "
            "their tolerances are derived; quantize it again with: "
            "tap-export quantize BUNDLE --calibration-data FOLDER --force"
        )
    rounding: Tolerances = FP16_TOLERANCES
    if precision == INT8_BF16:  # without bf16 in the text decoder
        rounding = {**BF16_TOLERANCES, graphs.LOGITS: FP16_TOLERANCES[graphs.LOGITS]}
    scores = {MASK_INDEX: graphs.IOU_PREDICTIONS, CAPTION_IDS: graphs.LOGITS}
    tolerances = {}
    for name, rounded in rounding.items():
        largest, mean = deviation[name]
        if name in scores:  # the scores of two candidates may err in opposite directions
            largest = max(largest, 2 * deviation[scores[name]][0])
        tolerances[name] = Tolerance(
            max=INT8_SLACK * largest + rounded.max,
            mean=None if rounded.mean is None else INT8_SLACK * mean + rounded.mean,
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
