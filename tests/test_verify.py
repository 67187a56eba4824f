"""Verification passes equal outputs and fails closed on everything else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tap_deploy import graphs
from tap_deploy.bundle.golden import GoldenSample
from tap_deploy.errors import BundleError, VerificationError
from tap_deploy.sessions.fake import FakeSession
from tap_deploy.sessions.opening import sessions_from_variant
from tap_deploy.verify.comparison import Report, compare
from tap_deploy.verify.graph_check import verify_sessions


@pytest.fixture(scope="module")
def sample(micro_bundle):
    return GoldenSample.load(micro_bundle.golden_path())


@pytest.fixture(scope="module")
def sessions(micro_bundle):
    return sessions_from_variant(micro_bundle.variant("fp32"))


def verify(sessions, config, sample):
    return verify_sessions(sessions, config, [sample], backend="test", precision="fp32")


def failed(report):
    return {(check.graph, check.tensor) for check in report.checks if not check.passed}


def spoiled(session, tensor, change):
    """Return the session with one output changed."""

    def compute(inputs):
        outputs = session.run(inputs)
        return {**outputs, tensor: change(outputs[tensor])}

    return FakeSession(session.spec, compute)


def test_right_sessions_pass(sessions, micro_config, sample):
    report = verify(sessions, micro_config, sample)
    assert report.passed
    assert len(report.checks) == 9
    report.require("unused")


@pytest.mark.parametrize(
    ("graph", "tensor", "expected"),
    [
        ("image_encoder", "image_embeddings", {("image_encoder", "image_embeddings")}),
        ("prompt_decoder", "low_res_masks", {("prompt_decoder", "low_res_masks")}),
        ("prompt_decoder", "iou_predictions", {("prompt_decoder", "iou_predictions")}),
        ("prompt_decoder", "semantic_tokens", {("prompt_decoder", "semantic_tokens")}),
        ("prompt_decoder", "semantic_embeddings", {("prompt_decoder", "semantic_embeddings")}),
        ("text_decoder", "logits", {("text_decoder", "logits")}),
    ],
)
def test_a_small_error_is_found_where_it_arises(
    sessions, micro_config, sample, graph, tensor, expected
):
    wrong = {**sessions, graph: spoiled(sessions[graph], tensor, lambda x: x + 0.002)}
    assert failed(verify(wrong, micro_config, sample)) >= expected
    assert all(
        name == graph or name == "end to end"
        for name, _ in failed(verify(wrong, micro_config, sample))
    )


def test_wrong_token(sessions, micro_config, sample):
    wrong = spoiled(sessions["text_decoder"], "next_ids", lambda ids: (ids + 1) % 500)
    report = verify({**sessions, "text_decoder": wrong}, micro_config, sample)
    assert failed(report) == {("text_decoder", "caption_ids"), ("end to end", "caption_ids")}
    with pytest.raises(VerificationError, match=r"2 of 9 comparisons failed; first: text_decoder"):
        report.require("bad")


def test_cache_that_is_not_written_is_found(sessions, micro_config, sample):
    wrong = spoiled(sessions["text_decoder"], graphs.PRESENT_KEY_VALUES, np.zeros_like)
    report = verify({**sessions, "text_decoder": wrong}, micro_config, sample)
    assert ("text_decoder", "logits") in failed(report)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_fails(bad):
    expected = np.zeros((2, 3), np.float32)
    actual = expected.copy()
    actual[1, 2] = bad
    check = compare("g", "t", "s", actual, expected, 1e9)
    assert not check.passed
    # even where the reference has the same
    assert not compare("g", "t", "s", actual, actual, 1e9).passed


def test_other_shape_fails():
    check = compare("g", "t", "s", np.zeros((2, 3)), np.zeros((3, 2)), 1e9)
    assert not check.passed


def test_nothing_compared_is_no_pass():
    report = Report(checks=(), backend="b", precision="p")
    assert not report.passed
    with pytest.raises(VerificationError, match="nothing was compared"):
        report.require("empty")


def test_report_prints_every_tensor_and_is_json(sessions, micro_config, sample):
    import json

    report = verify(sessions, micro_config, sample)
    text = str(report)
    for check in report.checks:
        assert check.tensor in text
    assert "4x4x128x128" in text
    assert text.endswith("PASSED: 9 comparisons, 0 failed (test, fp32)")
    bad = dataclasses.replace(report.checks[0], max_abs=float("inf"), max_rel=float("inf"))
    values = json.loads(json.dumps(Report(checks=(bad,), backend="b", precision="p").to_dict()))
    assert values["passed"] is False
    assert values["checks"][0]["max_abs"] is None


def test_golden_sample_round_trip(sample, tmp_path):
    sample.save(tmp_path / "s.npz")
    again = GoldenSample.load(tmp_path / "s.npz")
    for field in dataclasses.fields(sample):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(sample, field.name))


def golden_problem(path):
    with pytest.raises(BundleError, match="golden samples in") as caught:
        GoldenSample.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_broken_golden_samples_are_refused(sample, tmp_path):
    path = tmp_path / "s.npz"
    assert "No such file" in golden_problem(path)
    assert "directory" in golden_problem(tmp_path)
    sample.save(path)
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 255
    for broken in (b"", b"PK no", b"PK\x03\x04", whole[:2000], whole[:-1], bytes(changed)):
        path.write_bytes(broken)
        golden_problem(path)
    with path.open("wb") as file:
        np.save(file, sample.images)
    assert "not an .npz archive" in golden_problem(path)
    with path.open("wb") as file:
        np.savez(file, images=sample.images)
    assert "image_embeddings" in golden_problem(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("images", lambda x: x[..., :2], r"images is uint8 \[1, 512, 512, 2\]; expected"),
        ("images", lambda x: x.astype(np.float32), "images is float32"),
        ("images", lambda x: x[:0], "not empty"),
        ("image_embeddings", lambda x: np.concatenate([x, x]), "with {'B': 1}"),
        ("image_embeddings", lambda x: x[..., :-1], "image_embeddings is"),
        ("point_coords", lambda x: x[0], "point_coords is"),
        ("point_labels", lambda x: x[:, 1:], r"with {'P': 4, 'N': 4}"),
        ("point_labels", lambda x: x.astype(np.int64), "point_labels is int64"),
        ("low_res_masks", lambda x: x[..., 1:, 1:], "low_res_masks have side"),
        ("iou_predictions", lambda x: x[:, 1:], "iou_predictions is"),
        ("semantic_tokens", lambda x: x[..., 1:], "semantic_tokens is"),
        ("semantic_embeddings", lambda x: x[1:], "semantic_embeddings is"),
        ("mask_index", lambda x: x + 4, "mask_index holds"),
        ("mask_index", lambda x: x[1:], "mask_index is"),
        ("caption_ids", lambda x: x.astype(np.float32), "caption_ids is float32"),
        ("caption_ids", lambda x: x[:, 1:], "logits have"),
        ("logits", lambda x: x[0], "logits is"),
        ("logits", lambda x: x.astype(object), "pickle"),
    ],
)
def test_golden_samples_of_other_shapes_are_refused(sample, tmp_path, name, change, message):
    fields = {field.name for field in dataclasses.fields(sample)}
    arrays = {field: getattr(sample, field) for field in fields}
    np.savez(tmp_path / "s.npz", **arrays | {name: change(arrays[name])})
    with pytest.raises(BundleError, match=message):
        GoldenSample.load(tmp_path / "s.npz")
