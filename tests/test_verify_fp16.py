"""Verification of fp16: mean and maximum errors, and choices with small margins."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tap_deploy import graphs
from tap_deploy.bundle.variant import variant_specs
from tap_deploy.sessions.fake import FakeSession
from tap_deploy.sessions.opening import sessions_from_variant
from tap_deploy.verify.graph_check import verify_sessions


@pytest.fixture(scope="module")
def golden_sessions(micro_bundle):
    """Sessions of fp16 dtypes that answer exactly like fp32 ones."""

    sessions = sessions_from_variant(micro_bundle.variant("fp32"))

    def wrapped(name, spec):
        session = sessions[name]

        def compute(inputs):
            floats = {t.name: t.dtype for t in session.spec.inputs}
            return session.run({n: np.asarray(a, floats[n]) for n, a in inputs.items()})

        return FakeSession(spec, compute)

    return {n: wrapped(n, s) for n, s in variant_specs(micro_bundle.config, "fp16").items()}


def verified(sessions, bundle):
    golden = bundle.golden()
    first = dataclasses.replace(golden, samples=golden.samples[:1])
    report = verify_sessions(sessions, bundle.config, [first], backend="t", precision="fp16")
    checks = [check for check in report.checks if not check.sample.startswith("drawn")]
    return {(check.graph, check.tensor): check for check in checks}


def spoiled(session, change):
    return FakeSession(session.spec, lambda inputs: change(session.run(inputs)))


@pytest.mark.parametrize(("lead", "passes"), [(1e-3, True), (2.0, False)])
def test_another_token_may_win_only_narrowly(micro_bundle, golden_sessions, lead, passes):
    def change(outputs):
        logits = outputs["logits"].astype(np.float32)
        second = np.argsort(logits, axis=1)[:, -2]
        logits[np.arange(len(logits)), second] = logits.max(axis=1) + lead
        return {**outputs, "logits": logits, "next_ids": second.astype(np.int32)}

    name = graphs.TEXT_DECODER
    # The second-best logit is lifted, so that only ids and margins speak here.
    checks = verified(
        {**golden_sessions, name: spoiled(golden_sessions[name], change)}, micro_bundle
    )
    check = checks[name, "caption_ids"]
    assert check.passed is passes
    assert "of 532 differ, first at [0, 0]" in check.note
    assert checks["end to end", "caption_ids"].passed is passes


def test_a_token_that_is_not_the_best_by_its_own_logits_fails(micro_bundle, golden_sessions):
    def change(outputs):
        return {**outputs, "next_ids": outputs["logits"].argmin(axis=1).astype(np.int32)}

    name = graphs.TEXT_DECODER
    checks = verified(
        {**golden_sessions, name: spoiled(golden_sessions[name], change)}, micro_bundle
    )
    assert not checks[name, "caption_ids"].passed
    assert not checks["end to end", "caption_ids"].passed


@pytest.mark.parametrize("lead", [1e-3, 0.5])
def test_another_mask_may_win_only_narrowly(micro_bundle, golden_sessions, lead):
    sample = micro_bundle.golden().samples[0]

    def change(outputs):
        iou = outputs["iou_predictions"].astype(np.float32)
        rows = np.flatnonzero(sample.mask_index)
        other = 1 + sample.mask_index[rows] % 3
        iou[rows, other] = iou[rows, sample.mask_index[rows]] + lead
        index = outputs["mask_index"].copy()
        if index.shape[1] == 1:  # the graph is asked to choose
            index[rows, 0] = other
        return {**outputs, "iou_predictions": iou, "mask_index": index}

    name = graphs.PROMPT_DECODER
    checks = verified(
        {**golden_sessions, name: spoiled(golden_sessions[name], change)}, micro_bundle
    )
    narrow = lead < 1e-2
    assert checks[name, "mask_index"].passed is narrow
    assert "differ, first at" in checks[name, "mask_index"].note


def test_exact_sessions_pass(micro_bundle, golden_sessions):
    checks = verified(golden_sessions, micro_bundle)
    assert len(checks) == 14  # those of two kinds of text have one key
    for check in checks.values():
        assert check.passed, check


def test_a_mean_error_fails_where_the_largest_would_pass(micro_bundle, golden_sessions):
    name, tensor = graphs.IMAGE_ENCODER, graphs.IMAGE_EMBEDDINGS

    def change(outputs):
        array = outputs[tensor].astype(np.float32)
        return {tensor: array + 8e-3 * np.abs(array).mean() * np.sign(array)}

    checks = verified(
        {**golden_sessions, name: spoiled(golden_sessions[name], change)}, micro_bundle
    )
    check = checks[name, tensor]
    assert check.max_rel < check.tolerance
    assert not check.passed
