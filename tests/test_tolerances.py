"""The tolerances of outputs."""

from __future__ import annotations

import pytest

from tap_deploy import graphs
from tap_deploy.bundle.precision_record import Deviation, PrecisionRecord
from tap_deploy.verify.tolerances import (
    CAPTION_IDS,
    FP16_TOLERANCES,
    MASK_INDEX,
    tolerances_for,
)


@pytest.mark.parametrize(
    ("choice", "score"),
    [(MASK_INDEX, graphs.IOU_PREDICTIONS), (CAPTION_IDS, graphs.LOGITS)],
)
def test_a_choice_of_int8_may_err_by_twice_its_scores(choice, score):
    """Two candidates may each be off by the tolerance of their scores, in opposite directions."""
    deviation = {name: Deviation(max=0.001, mean=0.001) for name in FP16_TOLERANCES}
    deviation[score] = Deviation(max=0.1, mean=0.01)
    record = PrecisionRecord(golden_deviation=deviation)
    bounds = tolerances_for("int8", record)
    assert bounds[choice].max == pytest.approx(2 * bounds[score].max)
    deviation[choice] = Deviation(max=0.5, mean=0.5)  # the measured deviation is always allowed
    assert tolerances_for("int8", record)[choice].max > 2 * 0.5


def test_bf16_gives_the_text_decoder_no_room():
    """It computes in fp32 or int8, as without bf16."""
    deviation = {name: Deviation(max=0.001, mean=0.001) for name in FP16_TOLERANCES}
    record = PrecisionRecord(golden_deviation=deviation)
    for precision, made in (("bf16", "fp32"), ("int8+bf16", "int8")):
        bounds, without = tolerances_for(precision, record), tolerances_for(made, record)
        assert bounds[graphs.LOGITS] == without[graphs.LOGITS]
        assert bounds[graphs.LOW_RES_MASKS].max > without[graphs.LOW_RES_MASKS].max
