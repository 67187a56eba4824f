"""Comparison of each graph's outputs with golden samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tap_deploy import graphs
from tap_deploy.bundle.golden import GoldenSample
from tap_deploy.config import TapConfig
from tap_deploy.errors import InputError
from tap_deploy.masks import mask_rows, request_answers
from tap_deploy.sessions.caption_steps import CaptionSteps
from tap_deploy.sessions.caption_writer import blank_after_eos
from tap_deploy.sessions.contract import Session, to_float32, to_spec_dtypes
from tap_deploy.sessions.host_captioner import Captioner
from tap_deploy.verify.comparison import Comparison, Report, compare
from tap_deploy.verify.pipeline_check import Expected
from tap_deploy.verify.recorder import ComparisonRecorder
from tap_deploy.verify.tolerances import (
    CAPTION_IDS,
    FP32_TOLERANCES,
    MASK_INDEX,
    PROMPT_OUTPUTS,
    TOLERANCES,
    Tolerances,
)

END_TO_END = "end to end"


def verify_sessions(
    sessions: Mapping[str, Session],
    config: TapConfig,
    samples: list[GoldenSample],
    *,
    backend: str,
    precision: str,
    tolerances: Tolerances | None = None,
    on_check: Callable[[Comparison], None] | None = None,
) -> Report:
    """Run samples through the three graphs, stage by stage, and compare every output.

    Each stage gets the reference's inputs, so that a difference shows in the stage that causes it.
    Captions are also decoded end to end from the picture. If the tolerances allow other tokens or
    mask indices at all, then only where the scores are nearly tied.

    Args:
        sessions: one session per graph name.
        config: sizes of the model.
        samples: inputs and expected outputs.
        backend: name for the report.
        precision: name for the report, and for the default tolerances.
        tolerances: output name -> tolerance; None for those of the precision in
            ``tolerances.TOLERANCES``, or else those of fp32.
        on_check: called with every comparison.

    Raises:
        InputError: the prompts of a sample have more points than an engine takes.
        SessionError: a graph fails to run.
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
    """Return the samples with their prompts cut to the number that all sessions take.

    Raises:
        InputError: prompts have more points than a session takes. Points cannot be cut, because
            that changes the prompt.
    """
    limits = [session.limits for session in sessions.values()]
    most_points = min((limit["N"] for limit in limits if "N" in limit), default=None)
    most_prompts = min((limit["P"] for limit in limits if "P" in limit), default=None)
    for sample in samples:
        points = sample.point_labels.shape[1]
        if most_points is not None and points > most_points:
            raise InputError(
                f"golden samples have prompts of {points} points; expected at most {most_points}, "
                f"the limit of these engines; build them with --max-points {points}"
            )
    return samples if most_prompts is None else [s.first_prompts(most_prompts) for s in samples]


class _Verifier(ComparisonRecorder):
    """Runs and compares one stage per method."""

    def __init__(
        self,
        sessions: Mapping[str, Session],
        config: TapConfig,
        tolerances: Tolerances,
        on_check: Callable[[Comparison], None] | None,
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
        # A nearly tied mask may be chosen instead; compare the caption of the expected mask.
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
    """Return the expected outputs of a pipeline of the same graphs.

    If the tolerances require the reference's choices, these are the outputs of the reference.
    Otherwise errors propagate from one graph to the next, which the tolerances do not cover; the
    expected outputs are then those of the sessions, run one after the other from the picture.
    ``verify_sessions`` compares each graph with the reference.

    Raises:
        SessionError: a graph fails to run.
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
    """Run a graph of any float dtype on float32 inputs, and return float32 outputs."""
    return to_float32(session.run(to_spec_dtypes(session.spec, inputs)))


def decode_all_tokens(
    session: Session,
    config: TapConfig,
    sample: GoldenSample,
    image_embeddings: np.ndarray,
) -> dict[str, np.ndarray]:
    """Run the prompt decoder for all mask tokens and for the answering token.

    Args:
        session: session of the prompt decoder.
        config: sizes of the model.
        sample: sample with the prompts.
        image_embeddings: float ``[B, C, grid, grid]``; the first entry is used.

    Returns:
        The outputs for all tokens, float32 ``[P, M, ...]``, and ``mask_index``, int64 ``[P]``, the
        token that the graph selects.

    Raises:
        SessionError: the graph fails to run.
    """
    inputs = {
        graphs.IMAGE_EMBEDDINGS: image_embeddings[:1],
        graphs.POINT_COORDS: sample.point_coords,
        graphs.POINT_LABELS: sample.point_labels,
        graphs.MASK_ROWS: mask_rows(len(sample.point_labels)),
    }
    prompts = len(sample.point_labels)
    every = np.tile(np.arange(config.num_mask_tokens, dtype=np.int32), (prompts, 1))
    outputs = _run(session, inputs | {graphs.MASK_REQUEST: every})
    answers = _run(session, inputs | {graphs.MASK_REQUEST: request_answers(prompts)})
    return outputs | {graphs.MASK_INDEX: answers[graphs.MASK_INDEX][:, 0].astype(np.int64)}


def _decode_text(
    session: Session, config: TapConfig, sample: GoldenSample, semantic_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Decode with teacher forcing, so that an early mismatch does not affect later steps.

    Covers every length of the cache. Returns ids int64 ``[P, text_seq_len - 1]`` and logits
    float32 ``[P, steps, V]``.
    """
    steps = CaptionSteps(session, config, semantic_tokens)
    ids = sample.caption_ids.copy()
    logits = []
    for position in range(1, sample.logits.shape[1] + 1):
        ids[:, position] = steps.step(sample.caption_ids[:, position - 1])
        logits.append(steps.logits.astype(np.float32))
    return ids, np.stack(logits, axis=1)
