"""Verification passes equal outputs and fails closed on everything else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tap_deploy import graphs
from tap_deploy.bundle.golden import Golden, logit_digest
from tap_deploy.config import PointLabel
from tap_deploy.errors import BundleError, VerificationError
from tap_deploy.sessions.fake import FakeSession
from tap_deploy.sessions.opening import sessions_from_variant
from tap_deploy.verify.comparison import Report, compare
from tap_deploy.verify.graph_check import number_of_checks, verify_sessions


@pytest.fixture(scope="module")
def golden(micro_bundle):
    return micro_bundle.golden()


@pytest.fixture(scope="module")
def sessions(micro_bundle):
    return sessions_from_variant(micro_bundle.variant("fp32"))


def verify(sessions, config, golden):
    return verify_sessions(sessions, config, [golden], backend="test", precision="fp32")


def failed(report):
    return {(check.graph, check.tensor) for check in report.checks if not check.passed}


def spoiled(session, tensor, change):
    """Return the session with one output changed."""

    def compute(inputs):
        outputs = session.run(inputs)
        return {**outputs, tensor: change(outputs[tensor])}

    return FakeSession(session.spec, compute)


def test_right_sessions_pass(sessions, micro_config, golden):
    report = verify(sessions, micro_config, golden)
    assert report.passed
    assert len(report.checks) == number_of_checks([golden]) == 51
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
    sessions, micro_config, golden, graph, tensor, expected
):
    wrong = {**sessions, graph: spoiled(sessions[graph], tensor, lambda x: x + 0.002)}
    assert failed(verify(wrong, micro_config, golden)) >= expected
    assert all(
        name == graph or name == "end to end"
        for name, _ in failed(verify(wrong, micro_config, golden))
    )


def test_wrong_token(sessions, micro_config, golden):
    wrong = spoiled(sessions["text_decoder"], "next_ids", lambda ids: (ids + 1) % 500)
    report = verify({**sessions, "text_decoder": wrong}, micro_config, golden)
    assert failed(report) == {("text_decoder", "caption_ids"), ("end to end", "caption_ids")}
    with pytest.raises(VerificationError, match=r"6 of 51 comparisons failed; first: text_decoder"):
        report.require("bad")


def test_cache_that_is_not_written_is_found(sessions, micro_config, golden):
    wrong = spoiled(sessions["text_decoder"], graphs.PRESENT_KEY_VALUES, np.zeros_like)
    report = verify({**sessions, "text_decoder": wrong}, micro_config, golden)
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


def test_report_prints_every_tensor_and_is_json(sessions, micro_config, golden):
    import json

    report = verify(sessions, micro_config, golden)
    text = str(report)
    for check in report.checks:
        assert check.tensor in text
    assert "4x4x128x128" in text
    assert text.endswith("PASSED: 51 comparisons, 0 failed (test, fp32)")
    bad = dataclasses.replace(report.checks[0], max_abs=float("inf"), max_rel=float("inf"))
    values = json.loads(json.dumps(Report(checks=(bad,), backend="b", precision="p").to_dict()))
    assert values["passed"] is False
    assert values["checks"][0]["max_abs"] is None


def test_golden_samples_round_trip(golden, micro_config, tmp_path):
    golden.save(tmp_path / "s.npz")
    again = Golden.load(tmp_path / "s.npz", micro_config)
    parts = [*zip(golden.samples, again.samples, strict=True)]
    parts += [(golden.captions, again.captions), (golden.vocabulary, again.vocabulary)]
    for one, other in parts:
        for field in dataclasses.fields(one):
            np.testing.assert_array_equal(getattr(other, field.name), getattr(one, field.name))


def test_golden_samples_show_a_graph_all_it_may_get(golden, micro_config):
    labels = [np.unique(sample.point_labels) for sample in golden.samples]
    assert set(np.concatenate(labels).tolist()) == {*PointLabel}
    shapes = [sample.point_labels.shape for sample in golden.samples]
    assert len({count for count, _ in shapes}) == len({points for _, points in shapes}) == 3
    assert set(golden.vocabulary.input_ids.ravel()) == set(range(micro_config.vocab_size))


def test_every_logit_counts_in_a_digest():
    logits = np.random.default_rng(0).standard_normal((3, 500)).astype(np.float32)
    before = logit_digest(logits)
    assert before.shape == (3, 16)
    assert 0.5 < before.std() < 2  # the magnitude of the logits
    for column in range(500):
        other = logits.copy()
        other[:, column] += 1
        assert np.abs(logit_digest(other) - before).min() > 0.04
    swapped = logits[:, [1, 0, *range(2, 500)]]
    assert np.abs(logit_digest(swapped) - before).max() > 1e-3


def golden_problem(path, config):
    with pytest.raises(BundleError, match="golden samples in") as caught:
        Golden.load(path, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_broken_golden_samples_are_refused(golden, micro_config, tmp_path):
    path = tmp_path / "s.npz"
    assert "No such file" in golden_problem(path, micro_config)
    assert "directory" in golden_problem(tmp_path, micro_config)
    golden.save(path)
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 255
    for broken in (b"", b"PK no", b"PK\x03\x04", whole[:2000], whole[:-1], bytes(changed)):
        path.write_bytes(broken)
        golden_problem(path, micro_config)
    with path.open("wb") as file:
        np.save(file, golden.samples[0].images)
    assert "not an .npz archive" in golden_problem(path, micro_config)
    with path.open("wb") as file:
        np.savez(file, num_samples=np.array(1), images=golden.samples[0].images)
    assert "image_embeddings" in golden_problem(path, micro_config)


def test_golden_samples_of_another_model_are_refused(golden, micro_config, tmp_path):
    golden.save(tmp_path / "s.npz")
    for name, value in (("text_seq_len", 8), ("vocab_size", 400), ("num_mask_tokens", 3)):
        other = dataclasses.replace(micro_config, **{name: value})
        golden_problem(tmp_path / "s.npz", other)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("num_samples", lambda x: x + 20, "num_samples is 23; expected 1 to 16"),
        ("num_samples", lambda x: x[None], "num_samples is"),
        ("images", lambda x: x[..., :2], r"images is uint8 \[1, 512, 512, 2\]; expected"),
        ("images", lambda x: x.astype(np.float32), "images is float32"),
        ("images", lambda x: x[:0], "not empty"),
        ("image_embeddings", lambda x: np.concatenate([x, x]), "with {'B': 1"),
        ("image_embeddings", lambda x: x[..., :-1], "image_embeddings is"),
        ("0/point_coords", lambda x: x[0], "point_coords is"),
        ("0/point_labels", lambda x: x[:, 1:], r"with {'P': 4, 'N': 4}"),
        ("0/point_labels", lambda x: x.astype(np.int64), "point_labels is int64"),
        ("0/point_labels", lambda x: x + 1, "point_labels holds"),
        ("0/low_res_masks", lambda x: x[..., 1:, 1:], "low_res_masks is"),
        ("1/iou_predictions", lambda x: x[:, 1:], "iou_predictions is"),
        ("1/semantic_tokens", lambda x: x[..., 1:], "semantic_tokens is"),
        ("2/semantic_embeddings", lambda x: x[1:], "semantic_embeddings is"),
        ("0/mask_index", lambda x: x + 4, "mask_index holds"),
        ("0/mask_index", lambda x: x[1:], "mask_index is"),
        ("0/caption_ids", lambda x: x.astype(np.float32), "caption_ids is float32"),
        ("0/caption_ids", lambda x: x[:, 1:], "caption_ids is"),
        ("captions/logit_digests", lambda x: x[0], "logit_digests is"),
        ("captions/logit_digests", lambda x: x.astype(object), "holds Python objects"),
        ("vocabulary/input_ids", lambda x: x[:, 1:], "vocabulary/input_ids is"),
    ],
)
def test_golden_samples_of_other_shapes_are_refused(
    golden, micro_config, tmp_path, name, change, message
):
    golden.save(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as arrays:
        changed = {key: arrays[key] for key in arrays.files}
    np.savez(tmp_path / "s.npz", **changed | {name: change(changed[name])})
    with pytest.raises(BundleError, match=message):
        Golden.load(tmp_path / "s.npz", micro_config)
