"""How far an output may be from the reference, per precision and output, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tap_deploy import graphs
from tap_deploy.precisions import FP16, FP32

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
# Two candidates may each be off by the tolerance of their scores, in opposite directions.
_FP16_CHOICE = Tolerance(max=2 * _MAX, relative=True)
FP16_TOLERANCES: Tolerances = {
    graphs.IMAGE_EMBEDDINGS: _FP16,
    **{name: _FP16 for name in PROMPT_OUTPUTS},
    graphs.LOGITS: _FP16,
    CAPTION_IDS: _FP16_CHOICE,
    MASK_INDEX: _FP16_CHOICE,
}

TOLERANCES: Mapping[str, Tolerances] = {FP32: FP32_TOLERANCES, FP16: FP16_TOLERANCES}
