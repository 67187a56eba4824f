"""Agreement counts differences, their places, and the margins of the choices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")
from tap_deploy import graphs
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.engines.verdict.agreement import Case, ReferenceAnswers
from tap_deploy.engines.verdict.captions import (
    CaptionAgreement,
    Divergence,
    first_divergences,
    reference_margins,
)
from tap_deploy.errors import InputError
from tap_deploy.masks import mask_ious
from tap_deploy.prompts import Prompts
from tap_deploy.sessions.contract import Session, Tensors
from tap_deploy.sessions.host_captioner import Captioner
from tap_deploy.sessions.opening import sessions_from_bundle
from tap_deploy.sessions.run_on import RunOn

PAD = 499


class AlteredSession(Session):
    """A session whose outputs are changed on the way out."""

    def __init__(self, inner: Session, change: Any) -> None:
        super().__init__(inner.spec)
        self._inner, self._change = inner, change

    def _run(self, inputs: Tensors, outputs: Tensors) -> None:
        found = self._inner.run(inputs)
        self._change(found)
        for name, array in outputs.items():
            np.copyto(array, found[name])

    def close(self) -> None:
        self._inner.close()


@pytest.fixture(scope="module")
def sessions(micro_bundle: Bundle) -> dict[str, Session]:
    return sessions_from_bundle(micro_bundle, RunOn(threads=1))


@pytest.fixture(scope="module")
def answers(micro_bundle: Bundle, sessions: dict[str, Session], photo: Any) -> ReferenceAnswers:
    prompts = Prompts.concatenate(
        [
            Prompts.from_points([[[100, 80, 1]], [[200, 150, 1]]]),
            Prompts.from_boxes([[10, 20, 150, 160]]),
        ]
    )
    cases = [Case(image=photo, prompts=prompts)]
    vocabulary = micro_bundle.vocabulary()
    return ReferenceAnswers(sessions, micro_bundle.config, cases, vocabulary=vocabulary)


def test_the_reference_agrees_with_itself(answers, sessions):
    # Other session objects, so that everything is computed again.
    again = {
        name: AlteredSession(session, lambda found: None) for name, session in sessions.items()
    }
    for candidate in (sessions, again, {"text_decoder": again["text_decoder"]}):
        agreement = answers.agreement(candidate)
        assert agreement.regions == 3
        assert agreement.mask_iou == agreement.mask_iou_worst == agreement.concept_top1 == 1
        assert agreement.captions.identical == agreement.captions.tokens_equal == 1
        assert agreement.captions.median_margin is None
        assert min(agreement.sqnr_db.values()) > 100
        assert agreement.iou_drift == 0


def test_shifted_masks_and_scores_are_seen(answers, sessions):
    def change(found: dict[str, np.ndarray]) -> None:
        found[graphs.LOW_RES_MASKS] = -found[graphs.LOW_RES_MASKS]
        found[graphs.IOU_PREDICTIONS] = found[graphs.IOU_PREDICTIONS] + np.float32(0.25)

    altered = AlteredSession(sessions["prompt_decoder"], change)
    agreement = answers.agreement({"prompt_decoder": altered})
    assert agreement.mask_iou < 0.01
    assert agreement.iou_drift == pytest.approx(0.25, abs=1e-5)
    assert agreement.same_mask_token == 1
    assert agreement.captions.identical == 1
    # Noise twice the signal: 10 log10(1 / 4) dB.
    assert agreement.sqnr_db["low_res_masks"] == pytest.approx(-6.02, abs=0.01)


def test_other_semantics_change_names_and_captions(answers, sessions):
    def change(found: dict[str, np.ndarray]) -> None:
        for name in (graphs.SEMANTIC_EMBEDDINGS, graphs.SEMANTIC_TOKENS):
            found[name] = -found[name]

    altered = AlteredSession(sessions["prompt_decoder"], change)
    agreement = answers.agreement({"prompt_decoder": altered})
    assert agreement.mask_iou == 1
    assert agreement.concept_top1 < 0.5
    assert agreement.captions.identical < 1
    assert agreement.captions.median_margin > 0


def test_not_a_number_does_not_agree(answers, sessions):
    def change(found: dict[str, np.ndarray]) -> None:
        found[graphs.IMAGE_EMBEDDINGS] = found[graphs.IMAGE_EMBEDDINGS] * np.float32(np.nan)

    altered = AlteredSession(sessions["image_encoder"], change)
    agreement = answers.agreement({"image_encoder": altered})
    assert agreement.mask_iou < 0.5
    assert agreement.iou_drift == np.inf
    assert agreement.sqnr_db["image_embeddings"] == -200


def test_a_disturbed_text_decoder_costs_captions_alone(answers, sessions):
    def change(found: dict[str, np.ndarray]) -> None:
        # The second best token, always: every caption parts at its first token.
        second = np.argsort(-found[graphs.LOGITS], axis=1)[:, 1]
        found[graphs.NEXT_IDS] = second.astype(np.int32)

    agreement = answers.agreement(
        {"text_decoder": AlteredSession(sessions["text_decoder"], change)}
    )
    assert agreement.mask_iou == agreement.concept_top1 == 1
    assert agreement.captions.identical == agreement.captions.tokens_equal == 0
    assert agreement.captions.median_position == 1
    assert agreement.captions.largest_margin >= agreement.captions.median_margin > 0


def test_margins_are_those_of_the_reference(micro_bundle, sessions, answers):
    """The margin at a position is the gap between the logits in the decode loop."""
    config, session = micro_bundle.config, sessions["text_decoder"]
    seen: list[np.ndarray] = []
    recorder = AlteredSession(session, lambda found: seen.append(found[graphs.LOGITS].copy()))
    tokens = np.random.default_rng(0).standard_normal((1, config.image_embed_dim), np.float32)
    ids = Captioner(recorder, config).generate(tokens)
    place = 4
    other = ids.copy()
    other[0, place] = (ids[0, place] + 7) % 400
    margin = reference_margins(session, config, tokens, ids, other, np.array([place]))
    expected = seen[place][0, ids[0, place]] - seen[place][0, other[0, place]]
    assert margin[0] == pytest.approx(expected, abs=1e-4)


def test_first_divergences():
    expected = np.array(
        [[1, 5, 6, 2, PAD], [1, 5, 6, 2, PAD], [1, 5, 2, PAD, PAD], [1, 9, 9, 9, 9]]
    )
    found = np.array([[1, 5, 6, 2, PAD], [1, 5, 7, 2, PAD], [1, 5, 6, 2, PAD], [1, 9, 9, 9, 2]])
    equal, places = first_divergences(expected, found, np.array([3, 3, 2, 4]))
    assert equal.tolist() == [3, 1, 1, 3]
    assert places.tolist() == [0, 2, 2, 4]


def test_caption_agreement_pools_tokens():
    parted = [Divergence(position=2, logit_margin=0.5), Divergence(position=4, logit_margin=0.1)]
    captions = CaptionAgreement.from_regions([4, 4, 2], [4, 1, 2], parted)
    assert captions.tokens_equal == pytest.approx(0.7)
    assert captions.identical == pytest.approx(1 / 3)
    assert (captions.median_position, captions.largest_margin) == (3, 0.5)


def test_mask_ious():
    empty, full = np.zeros((1, 2, 2), bool), np.ones((1, 2, 2), bool)
    half = np.array([[[True, True], [False, False]]])
    masks = np.concatenate([empty, full, half])
    assert mask_ious(masks, np.concatenate([empty, half, empty])).tolist() == [1, 0.5, 0]


def test_no_regions_are_refused(micro_bundle, sessions, photo):
    none = Case(image=photo, prompts=Prompts.from_boxes(np.zeros((0, 4))))
    with pytest.raises(InputError, match="no regions"):
        ReferenceAnswers(sessions, micro_bundle.config, [none])
