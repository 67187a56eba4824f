"""Are the graphs still the model? Outputs of sessions against golden samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tap_deploy import graphs
from tap_deploy.bundle.golden import GoldenSample
from tap_deploy.config import TapConfig
from tap_deploy.errors import InputError
from tap_deploy.masks import request_answers
from tap_deploy.sessions.caption_steps import CaptionSteps
from tap_deploy.sessions.caption_writer import blank_after_eos
from tap_deploy.sessions.contract import Session, to_float32, to_spec_dtypes
from tap_deploy.sessions.host_captioner import Captioner
from tap_deploy.verify.comparison import Check, Report, compare
from tap_deploy.verify.pipeline_check import Expected
from tap_deploy.verify.recorder import CheckRecorder
from tap_deploy.verify.tolerances import (
    CAPTION_IDS,
    FP32_TOLERANCES,
    MASK_INDEX,
    PROMPT_OUTPUTS,
    TOLERANCES,
    Tolerances,
)

__all__ = ["Check", "Report", "expected_of_pipeline", "verify_sessions"]

END_TO_END = "end to end"


def verify_sessions(
    sessions: Mapping[str, Session],
    config: TapConfig,
    samples: list[GoldenSample],
    *,
    backend: str,
    precision: str,
    tolerances: Tolerances | None = None,
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
    return Report(checks=tuple(verifier.checks), backend=backend, precision=precision)


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


class _Verifier(CheckRecorder):
    """Makes the comparisons of one verification, one method per stage."""

    def __init__(
        self,
        sessions: Mapping[str, Session],
        config: TapConfig,
        tolerances: Tolerances,
        on_check: Callable[[Check], None] | None,
    ) -> None:
        super().__init__(tolerances, on_check)
        self.sessions, self.config = sessions, config

    def check_image_encoder(self, sample: GoldenSample) -> np.ndarray:
        outputs = _run(self.sessions[graphs.IMAGE_ENCODER], {graphs.IMAGES: sample.images})
        actual = outputs[graphs.IMAGE_EMBEDDINGS]
        expected = sample.image_embeddings
        self.add(graphs.IMAGE_ENCODER, graphs.IMAGE_EMBEDDINGS, sample.name, actual, expected)
        return actual

    def check_prompt_decoder(self, sample: GoldenSample) -> None:
        session, graph = self.sessions[graphs.PROMPT_DECODER], graphs.PROMPT_DECODER
        outputs = decode_all_tokens(session, self.config, sample, sample.image_embeddings)
        for tensor in PROMPT_OUTPUTS:
            self.add(graph, tensor, sample.name, outputs[tensor], getattr(sample, tensor))
        iou = outputs[graphs.IOU_PREDICTIONS]
        chosen = outputs[graphs.MASK_INDEX]
        self.add_choice(graph, MASK_INDEX, sample.name, chosen, sample.mask_index, iou)

    def check_text_decoder(self, sample: GoldenSample) -> None:
        ids, logits = _decode_text(
            self.sessions[graphs.TEXT_DECODER], self.config, sample, sample.chosen_tokens
        )
        graph, name = graphs.TEXT_DECODER, sample.name
        self.add_choice(graph, CAPTION_IDS, name, ids[:, 1:], sample.caption_ids[:, 1:], logits)
        if sample.logits.shape[-1] == 1:
            logits = logits.max(axis=-1, keepdims=True)
        self.add(graph, graphs.LOGITS, name, logits, sample.logits)

    def check_end_to_end(self, sample: GoldenSample, image_embeddings: np.ndarray) -> None:
        session = self.sessions[graphs.PROMPT_DECODER]
        outputs = decode_all_tokens(session, self.config, sample, image_embeddings)
        iou, index = outputs[graphs.IOU_PREDICTIONS], outputs[graphs.MASK_INDEX]
        narrow = self.is_narrow(MASK_INDEX, iou, index, sample.mask_index)
        # Another mask that is as good has another caption; that is no error of the captions.
        index = np.where(narrow, sample.mask_index, index)
        tokens = outputs[graphs.SEMANTIC_TOKENS][np.arange(len(index)), index]
        session, name = self.sessions[graphs.TEXT_DECODER], sample.name
        expected = blank_after_eos(sample.caption_ids, self.config.pad_id)
        actual = Captioner(session, self.config).generate(tokens)
        if self.tolerances[CAPTION_IDS].max == 0 or np.array_equal(actual, expected):
            self.record(compare(END_TO_END, CAPTION_IDS, name, actual, expected, 0))
        else:
            ids, logits = _decode_text(session, self.config, sample, tokens)
            self.add_captions(END_TO_END, name, actual, expected, logits, ids)


def expected_of_pipeline(
    sessions: Mapping[str, Session], config: TapConfig, sample: GoldenSample, tolerances: Tolerances
) -> Expected:
    """Return what the pipeline of the same graphs must give.

    Where choices are bound to those of the reference, that is what the reference gives. Elsewhere
    a graph's error is the next one's input, and the tolerances know nothing of that: then it is
    what the graphs give, one after the other, from the picture on. Each of them is held against
    the reference by ``verify_sessions``.

    Raises:
        SessionError: a graph cannot be run.
    """
    if tolerances[MASK_INDEX].max == 0 and tolerances[CAPTION_IDS].max == 0:
        return Expected.from_sample(sample)
    encoded = _run(sessions[graphs.IMAGE_ENCODER], {graphs.IMAGES: sample.images[:1]})
    embeddings = encoded[graphs.IMAGE_EMBEDDINGS]
    outputs = decode_all_tokens(sessions[graphs.PROMPT_DECODER], config, sample, embeddings)
    rows = np.arange(len(sample.mask_index))
    tokens = outputs[graphs.SEMANTIC_TOKENS][rows, sample.mask_index]
    _, logits = _decode_text(sessions[graphs.TEXT_DECODER], config, sample, tokens)
    return Expected(prompt_outputs=outputs, logits=logits)


def _run(session: Session, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a graph of any float dtype on float32, and return float32."""
    return to_float32(session.run(to_spec_dtypes(session.spec, inputs)))


def decode_all_tokens(
    session: Session,
    config: TapConfig,
    sample: GoldenSample,
    image_embeddings: np.ndarray,
) -> dict[str, np.ndarray]:
    """Ask the prompt decoder for every mask token, and which one it says answers the prompt.

    Args:
        session: runs the graph.
        config: sizes of the model.
        sample: prompts.
        image_embeddings: float ``[B, C, grid, grid]``; the first is taken.

    Returns:
        the outputs of the graph as float32, for all tokens ``[P, M, ...]``, and ``mask_index``
        int64 ``[P]`` as the graph chooses it.

    Raises:
        SessionError: the graph cannot be run.
    """
    inputs = {
        graphs.IMAGE_EMBEDDINGS: image_embeddings[:1],
        graphs.POINT_COORDS: sample.point_coords,
        graphs.POINT_LABELS: sample.point_labels,
    }
    prompts = len(sample.point_labels)
    every = np.tile(np.arange(config.num_mask_tokens, dtype=np.int32), (prompts, 1))
    outputs = _run(session, inputs | {graphs.MASK_REQUEST: every})
    answers = _run(session, inputs | {graphs.MASK_REQUEST: request_answers(prompts)})
    return outputs | {graphs.MASK_INDEX: answers[graphs.MASK_INDEX][:, 0].astype(np.int64)}


def _decode_text(
    session: Session, config: TapConfig, sample: GoldenSample, semantic_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Feed the expected caption step by step: every length of the cache is compared.

    Each step is fed with the reference's token, so one early miss does not spoil the rest.
    Returns ids int64 ``[P, text_seq_len - 1]`` and logits float32 ``[P, steps, V]``.
    """
    steps = CaptionSteps(session, config, semantic_tokens)
    ids = sample.caption_ids.copy()
    logits = []
    for position in range(1, sample.logits.shape[1] + 1):
        ids[:, position] = steps.step(sample.caption_ids[:, position - 1])
        logits.append(steps.logits.astype(np.float32))
    return ids, np.stack(logits, axis=1)
