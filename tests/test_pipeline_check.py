"""Pipeline results are checked within tolerances: only equally good choices pass."""

from __future__ import annotations

import numpy as np
import pytest

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.sessions.opening import pipeline_from_bundle, sessions_from_bundle
from tap_deploy.sessions.options import DeviceOptions
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.verify.graph_check import expected_of_pipeline
from tap_deploy.verify.pipeline_check import CHECKS_PER_RUN, RUNS, check_pipeline
from tap_deploy.verify.recorder import ComparisonRecorder
from tap_deploy.verify.tolerances import FP16_TOLERANCES
from tests import fake_onnxruntime


@pytest.fixture(scope="module")
def bundle(micro_bundle):
    return Bundle.open(micro_bundle.path)


@pytest.fixture(scope="module")
def sample(bundle):
    return bundle.golden().samples[0]


@pytest.fixture(scope="module")
def expected(bundle, sample):
    sessions = sessions_from_bundle(bundle, RunOn(threads=1))
    return expected_of_pipeline(sessions, bundle.config, sample)


def failed(bundle, sample, expected, ids_of=None):
    pipeline = pipeline_from_bundle(bundle, RunOn(threads=1))
    if ids_of is not None:
        with pipeline.lane() as lane:
            caption = lane.caption
            lane.caption = lambda *args, **options: ids_of(caption(*args, **options))
    recorder = ComparisonRecorder(FP16_TOLERANCES, None)
    check_pipeline(pipeline, sample, expected, bundle.config.pad_id, recorder)
    pipeline.close()
    assert len(recorder.checks) == len(RUNS) * CHECKS_PER_RUN
    return [(check.tensor, check.sample) for check in recorder.checks if not check.passed]


def test_a_pipeline_that_is_right(bundle, sample, expected):
    assert expected.logits.shape[-1] == bundle.config.vocab_size  # measured, not golden
    assert failed(bundle, sample, expected) == []


@pytest.mark.parametrize("wrong_id", ["worst", "garbage", "negative"])
def test_tokens_that_score_worse(bundle, sample, expected, wrong_id):
    """Ids that do not fit the logits come from uninitialised memory."""

    def spoil(ids):
        worst = int(expected.logits[0, 4].argmin())
        ids[0, 5] = {"worst": worst, "garbage": 1 << 30, "negative": -7}[wrong_id]
        return ids

    assert failed(bundle, sample, expected, spoil) == [
        ("caption_ids", f"{sample.name} {run}") for run in RUNS
    ]


def test_a_token_that_scores_as_well(bundle, sample, expected):
    """After it, the captions differ, which is not an error."""
    logits = expected.logits.copy()
    other = int(expected.logits[0, 4].argmin())
    ends = [0, -1]  # the prompts also come in reverse
    logits[ends, 4, other] = logits[ends, 4].max(axis=-1) - 1e-6

    def change(ids):
        ids[ends, 5], ids[ends, 6:] = other, 1
        return ids

    close = type(expected)(prompt_outputs=expected.prompt_outputs, logits=logits)
    assert failed(bundle, sample, close, change) == []


def test_masks_that_are_off(bundle, sample, expected):
    outputs = dict(expected.prompt_outputs)
    outputs["low_res_masks"] = outputs["low_res_masks"] + np.float32(9)
    other = type(expected)(prompt_outputs=outputs, logits=expected.logits)
    assert failed(bundle, sample, other) == [
        ("low_res_masks", f"{sample.name} {run}") for run in RUNS
    ]


@pytest.mark.parametrize(
    ("stale", "tensor", "run"),
    [
        ("images", "low_res_masks", "mirrored picture"),
        ("image_embeddings", "low_res_masks", "mirrored picture"),
        ("point_coords", "low_res_masks", "reversed prompts"),
        ("point_labels", "low_res_masks", "reversed prompts"),
        ("semantic_tokens", "caption_ids", "reversed prompts"),
        (None, None, None),
    ],
)
def test_inputs_that_are_read_once(
    bundle, sample, expected, monkeypatch, cuda, tmp_path, stale, tensor, run
):
    """Inputs copied in the first run are correct until the picture or prompt changes."""
    names = () if stale is None else (stale,)
    fake_onnxruntime.install(monkeypatch, cuda, stale=names)
    options = DeviceOptions(cache_folder=tmp_path)
    pipeline = pipeline_from_bundle(bundle, RunOn(device="cuda"), options)
    recorder = ComparisonRecorder(FP16_TOLERANCES, None)
    check_pipeline(pipeline, sample, expected, bundle.config.pad_id, recorder)
    assert pipeline.steps_replayed > 0
    pipeline.close()
    found = [(check.tensor, check.sample) for check in recorder.checks if not check.passed]
    wanted = [] if stale is None else [(tensor, f"{sample.name} {run}")]
    assert set(wanted) <= set(found) and bool(wanted) == bool(found)
    assert not any("first run" in name or "replayed" in name for _, name in found)
