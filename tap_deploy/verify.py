"""Are the graphs still the model? Outputs of sessions against golden samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tap_deploy import graphs
from tap_deploy.captioner import Captioner, blank_after_eos
from tap_deploy.comparison import Check, Report, compare, compare_choices
from tap_deploy.config import TapConfig
from tap_deploy.errors import InputError
from tap_deploy.golden import GoldenSample
from tap_deploy.masks import select_mask_token
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.float_types import to_float32, to_spec_dtypes
from tap_deploy.tolerances import (
    CAPTION_IDS,
    FP32_TOLERANCES,
    MASK_INDEX,
    PROMPT_OUTPUTS,
    TOLERANCES,
    Tolerances,
)

__all__ = ["Check", "Report", "compare", "verify_sessions"]

END_TO_END = "end to end"


def verify_sessions(
    sessions: Mapping[str, Session],
    config: TapConfig,
    samples: list[GoldenSample],
    *,
    backend: str,
    precision: str,
    tolerances: Tolerances | None = None,
    evaluator: str = "",
    is_witness: bool = True,
    on_check: Callable[[Check], None] | None = None,
) -> Report:
    """Run samples through the three graphs, stage by stage, and compare every output.

    Each stage is fed with what the reference gave to it, so that a difference is found where
    it arises; the captions are also made from end to end, from the picture on. Where tokens or
    mask indices may differ at all, they may only where the scores are as good as equal.

    Args:
        sessions: one session per graph name.
        config: sizes of the model.
        samples: inputs and expected outputs.
        backend: name for the report.
        precision: name for the report, and for the tolerances.
        tolerances: by output; by default those of the precision in ``tolerances.TOLERANCES``,
            or else the strictest.
        evaluator: what runs the sessions, for the report, if it is not the backend.
        is_witness: whether it rounds as the precision demands.
        on_check: called with every comparison as it is made.

    Raises:
        InputError: a sample has prompts of more points than an engine takes.
        SessionError: a graph cannot be run.
    """
    samples = samples_within_limits(sessions, samples)
    bounds = TOLERANCES.get(precision, FP32_TOLERANCES) if tolerances is None else tolerances
    verifier = _Verifier(sessions, config, bounds, on_check)
    for sample in samples:
        embeddings = verifier.check_image_encoder(sample)
        verifier.check_prompt_decoder(sample)
        verifier.check_text_decoder(sample)
        verifier.check_end_to_end(sample, embeddings)
    return Report(
        checks=tuple(verifier.checks),
        backend=backend,
        precision=precision,
        evaluator=evaluator,
        is_witness=is_witness,
    )


def samples_within_limits(
    sessions: Mapping[str, Session], samples: list[GoldenSample]
) -> list[GoldenSample]:
    """Return samples with as many prompts as all sessions take.

    Raises:
        InputError: prompts have more points than a session takes; fewer would be other prompts.
    """
    limits = [session.limits for session in sessions.values()]
    most_points = min((limit["N"] for limit in limits if "N" in limit), default=None)
    most_prompts = min((limit["P"] for limit in limits if "P" in limit), default=None)
    for sample in samples:
        points = sample.point_labels.shape[1]
        if most_points is not None and points > most_points:
            raise InputError(
                f"golden samples have prompts of {points} points, these engines take at most "
                f"{most_points} and cannot be checked; build them with --max-points {points}"
            )
    return samples if most_prompts is None else [s.first_prompts(most_prompts) for s in samples]


class _Verifier:
    """Makes the comparisons of one verification, one method per stage."""

    def __init__(
        self,
        sessions: Mapping[str, Session],
        config: TapConfig,
        tolerances: Tolerances,
        on_check: Callable[[Check], None] | None,
    ) -> None:
        self.sessions, self.config, self.tolerances = sessions, config, tolerances
        self.on_check = on_check
        self.checks: list[Check] = []

    def check_image_encoder(self, sample: GoldenSample) -> np.ndarray:
        outputs = _run(self.sessions[graphs.IMAGE_ENCODER], {graphs.IMAGES: sample.images})
        actual = outputs[graphs.IMAGE_EMBEDDINGS]
        expected = sample.image_embeddings
        self._add(graphs.IMAGE_ENCODER, graphs.IMAGE_EMBEDDINGS, sample, actual, expected)
        return actual

    def check_prompt_decoder(self, sample: GoldenSample) -> None:
        outputs = _decode_prompts(self.sessions, sample, sample.image_embeddings)
        for tensor in PROMPT_OUTPUTS:
            expected = getattr(sample, tensor)
            self._add(graphs.PROMPT_DECODER, tensor, sample, outputs[tensor], expected)
        iou = outputs[graphs.IOU_PREDICTIONS]
        chosen = select_mask_token(iou, sample.point_labels)
        self._add_choice(graphs.PROMPT_DECODER, MASK_INDEX, sample, chosen, sample.mask_index, iou)

    def check_text_decoder(self, sample: GoldenSample) -> None:
        ids, logits = _decode_text(
            self.sessions[graphs.TEXT_DECODER], self.config, sample, sample.chosen_tokens
        )
        graph = graphs.TEXT_DECODER
        self._add_choice(graph, CAPTION_IDS, sample, ids[:, 1:], sample.caption_ids[:, 1:], logits)
        if sample.logits.shape[-1] == 1:
            logits = logits.max(axis=-1, keepdims=True)
        self._add(graph, graphs.LOGITS, sample, logits, sample.logits)

    def check_end_to_end(self, sample: GoldenSample, image_embeddings: np.ndarray) -> None:
        outputs = _decode_prompts(self.sessions, sample, image_embeddings)
        iou = outputs[graphs.IOU_PREDICTIONS]
        index = select_mask_token(iou, sample.point_labels)
        narrow = _margins(iou, index, sample.mask_index) <= self._margin_bound(MASK_INDEX, iou)
        # Another mask that is as good has another caption; that is no error of the captions.
        index = np.where(narrow, sample.mask_index, index)
        tokens = outputs[graphs.SEMANTIC_TOKENS][np.arange(len(index)), index]
        captioner = Captioner(self.sessions[graphs.TEXT_DECODER], self.config)
        expected = blank_after_eos(sample.caption_ids, self.config.pad_id)
        actual = captioner.generate(tokens)
        if self.tolerances[CAPTION_IDS].max == 0 or np.array_equal(actual, expected):
            self._record(compare(END_TO_END, CAPTION_IDS, sample.name, actual, expected, 0))
        else:
            self._add_captions(sample, tokens, actual, expected)

    def _add_captions(
        self, sample: GoldenSample, tokens: np.ndarray, actual: np.ndarray, expected: np.ndarray
    ) -> None:
        """Judge each caption at the token where it leaves the expected one; after it, anything.

        Up to there both have the same prefix, so the logits on the expected caption are those
        that the choice was made from.
        """
        ids, logits = _decode_text(self.sessions[graphs.TEXT_DECODER], self.config, sample, tokens)
        differs = actual[:, 1:] != expected[:, 1:]
        first = np.where(differs.any(axis=1), differs.argmax(axis=1), -1)
        at_first = np.arange(differs.shape[1]) == first[:, None]
        choice = np.where(at_first, ids[:, 1:], sample.caption_ids[:, 1:])
        self._add_choice(END_TO_END, CAPTION_IDS, sample, choice, sample.caption_ids[:, 1:], logits)

    def _margin_bound(self, tensor: str, scores: np.ndarray) -> float:
        bound = self.tolerances[tensor]
        return bound.max * (float(np.abs(scores).max()) if bound.relative else 1.0)

    def _add(
        self,
        graph: str,
        tensor: str,
        sample: GoldenSample,
        actual: np.ndarray,
        expected: np.ndarray,
    ) -> None:
        self._record(compare(graph, tensor, sample.name, actual, expected, self.tolerances[tensor]))

    def _add_choice(
        self,
        graph: str,
        tensor: str,
        sample: GoldenSample,
        actual: np.ndarray,
        expected: np.ndarray,
        scores: np.ndarray,
    ) -> None:
        """Compare choices ``[...]`` that were made from measured scores ``[..., candidates]``."""
        bound = self.tolerances[tensor]
        if bound.max == 0:
            self._record(compare(graph, tensor, sample.name, actual, expected, bound))
            return
        differs = actual != expected
        margins = _margins(scores, actual, expected)
        where = np.argwhere(differs)
        note = ""
        if len(where):
            at = tuple(int(i) for i in where[0])
            note = (
                f"{len(where)} of {differs.size} differ, first at {list(at)}: {actual[at]}, "
                f"expected {expected[at]}, margin {margins[at]:.1e}"
            )
        self._record(
            compare_choices(
                graph,
                tensor,
                sample.name,
                actual.shape,
                margins[differs],
                float(np.abs(scores).max()),
                bound,
                note,
            )
        )

    def _record(self, check: Check) -> None:
        self.checks.append(check)
        if self.on_check is not None:
            self.on_check(check)


def _margins(scores: np.ndarray, actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return how far apart the actual and the expected choice score, ``[...]``.

    The distance, not the lead: a choice that is not even the best by its own scores is an error.
    """
    picked = [
        np.take_along_axis(scores, choice[..., None], axis=-1)[..., 0]
        for choice in (actual, expected)
    ]
    margins: np.ndarray = np.abs(picked[0].astype(np.float64) - picked[1])
    return margins


def _run(session: Session, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a graph of any float dtype on float32, and return float32."""
    return to_float32(session.run(to_spec_dtypes(session.spec, inputs)))


def _decode_prompts(
    sessions: Mapping[str, Session], sample: GoldenSample, image_embeddings: np.ndarray
) -> dict[str, np.ndarray]:
    return _run(
        sessions[graphs.PROMPT_DECODER],
        {
            graphs.IMAGE_EMBEDDINGS: image_embeddings[:1],
            graphs.POINT_COORDS: sample.point_coords,
            graphs.POINT_LABELS: sample.point_labels,
        },
    )


def _decode_text(
    session: Session, config: TapConfig, sample: GoldenSample, semantic_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Feed the expected caption step by step: every length of the cache is compared.

    Each step is fed with the reference's token, so one early miss does not spoil the rest.
    Returns ids int64 ``[P, text_seq_len - 1]`` and logits float32 ``[P, steps, V]``.
    """
    rows, steps = len(sample.caption_ids), sample.logits.shape[1]
    past = next(tensor for tensor in session.spec.inputs if tensor.name == graphs.PAST_KEY_VALUES)
    cache = session.allocate(graphs.kv_cache_shape(config, rows), past.dtype)
    ids = sample.caption_ids.copy()
    logits = []
    for position in range(steps + 1):
        feed = sample.caption_ids[:, max(0, position - 1)]
        inputs = {
            graphs.SEMANTIC_TOKENS: semantic_tokens,
            graphs.INPUT_IDS: feed.astype(np.int32),
            graphs.POSITION: np.array([position], np.int32),
            graphs.PAST_KEY_VALUES: cache[:position] if position else cache[1:2],
        }
        outputs = session.run(
            to_spec_dtypes(session.spec, inputs),
            into={graphs.PRESENT_KEY_VALUES: cache[position : position + 1]},
        )
        if position:
            ids[:, position] = outputs[graphs.NEXT_IDS]
            logits.append(outputs[graphs.LOGITS].astype(np.float32))
    return ids, np.stack(logits, axis=1)
