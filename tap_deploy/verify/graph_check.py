"""Comparison of each graph's outputs with golden samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tap_deploy import graphs
from tap_deploy.bundle.golden import Golden, GoldenSample, GoldenText
from tap_deploy.config import TapConfig
from tap_deploy.errors import InputError
from tap_deploy.sessions.caption_writer import blank_after_eos
from tap_deploy.sessions.contract import Session, to_float32, to_spec_dtypes
from tap_deploy.sessions.host_captioner import Captioner
from tap_deploy.verify.answers import AnswerTally
from tap_deploy.verify.comparison import END_TO_END, Comparison, Report, compare
from tap_deploy.verify.pipeline_check import Expected
from tap_deploy.verify.prompt_outputs import decode_all_tokens, decode_answers
from tap_deploy.verify.recorder import ComparisonRecorder, choice_margins
from tap_deploy.verify.text_steps import draw_tokens, logits_of, run_text
from tap_deploy.verify.tolerances import (
    CAPTION_IDS,
    FP32_TOLERANCES,
    MASK_INDEX,
    PROMPT_OUTPUTS,
    TOLERANCES,
    Tolerances,
    chained_tolerances,
)


def verify_sessions(
    sessions: Mapping[str, Session],
    config: TapConfig,
    goldens: Sequence[Golden],
    *,
    backend: str,
    precision: str,
    tolerances: Tolerances | None = None,
    on_check: Callable[[Comparison], None] | None = None,
    tally: AnswerTally | None = None,
) -> Report:
    """Run samples through the graphs, stage by stage and in a chain, and compare all outputs.

    Each stage gets the reference's inputs, so that a difference shows in the stage that causes it.
    Then each gets the outputs of the stage before it, from the picture on, as a predictor runs
    them. Other tokens or mask indices pass only where the scores are nearly tied.

    Args:
        sessions: one session per graph name.
        config: sizes of the model.
        goldens: inputs and expected outputs.
        backend: name for the report.
        precision: name for the report, and for the default tolerances.
        tolerances: output name -> tolerance; None for those of the precision in
            ``tolerances.TOLERANCES``, or else those of fp32.
        on_check: called with every comparison.
        tally: counts the answers of the chain: masks, names and captions.

    Raises:
        InputError: the prompts of a sample have more points than an engine takes.
        SessionError: a graph fails to run.
    """
    goldens = [within_limits(sessions, golden) for golden in goldens]
    bounds = TOLERANCES.get(precision, FP32_TOLERANCES) if tolerances is None else tolerances
    chained = chained_tolerances(precision, bounds)
    verifier = _Verifier(sessions, config, ComparisonRecorder(bounds, on_check, chained), tally)
    for golden in goldens:
        verifier.check(golden)
    return Report(checks=tuple(verifier.recorder.checks), backend=backend, precision=precision)


def number_of_checks(goldens: Sequence[Golden]) -> int:
    """Return the number of comparisons of ``verify_sessions``."""
    decoded = len(PROMPT_OUTPUTS) + 1  # and the mask index
    return sum(
        3
        + 3 * (golden.vocabulary is not None)
        + len(golden.samples) * (2 * decoded + 1 + len(PROMPT_OUTPUTS))
        for golden in goldens
    )


def within_limits(sessions: Mapping[str, Session], golden: Golden) -> Golden:
    """Return the samples that all sessions take, cut to the number of prompts that they take.

    Raises:
        InputError: all prompts have more points than a session takes. Points cannot be cut,
            because that changes the prompt.
    """
    limits = [session.limits for session in sessions.values()]
    most_points = min((limit["N"] for limit in limits if "N" in limit), default=None)
    most_prompts = min((limit["P"] for limit in limits if "P" in limit), default=None)
    samples, lengths = golden.samples, [s.point_labels.shape[1] for s in golden.samples]
    if most_points is not None:
        if min(lengths) > most_points:
            raise InputError(
                f"golden samples have prompts of {min(lengths)} points; expected at most "
                f"{most_points}, the limit of these engines; build them with "
                f"--max-points {min(lengths)}"
            )
        samples = tuple(
            s for s, length in zip(samples, lengths, strict=True) if length <= most_points
        )
    if most_prompts is not None:
        samples = tuple(sample.first_prompts(most_prompts) for sample in samples)
    return dataclasses.replace(golden, samples=samples)


class _Verifier:
    """Runs and compares one stage per method."""

    def __init__(
        self,
        sessions: Mapping[str, Session],
        config: TapConfig,
        recorder: ComparisonRecorder,
        tally: AnswerTally | None,
    ) -> None:
        self.sessions, self.config = sessions, config
        self.recorder, self.tally = recorder, tally

    def check(self, golden: Golden) -> None:
        """Compare all samples, each stage on its own, and then the chain."""
        embeddings = self._check_image_encoder(golden.samples[0])
        for sample in golden.samples:
            self._check_prompt_decoder(sample)
        picture = golden.samples[0].picture
        self._check_text(golden.captions, picture, "captions", whole_cache=False)
        if golden.vocabulary is not None:
            self._check_text(golden.vocabulary, picture, "any tokens", whole_cache=True)
            self._check_draws(golden.captions)
        for sample in golden.samples:
            self._check_chain(sample, embeddings)

    def _check_image_encoder(self, sample: GoldenSample) -> np.ndarray:
        outputs = _run(self.sessions[graphs.IMAGE_ENCODER], {graphs.IMAGES: sample.images})
        actual = outputs[graphs.IMAGE_EMBEDDINGS]
        shape = "x".join(map(str, sample.images.shape[1:3]))
        name = f"{sample.picture} B={len(sample.images)} {shape}".lstrip()
        graph, expected = graphs.IMAGE_ENCODER, sample.image_embeddings
        self.recorder.add(graph, graphs.IMAGE_EMBEDDINGS, name, actual, expected)
        return actual

    def _check_prompt_decoder(self, sample: GoldenSample) -> None:
        graph = graphs.PROMPT_DECODER
        outputs = self._decode(sample, sample.image_embeddings)
        self._add_prompt_outputs(graph, sample, outputs)
        answers = decode_answers(
            self.sessions[graph], sample.point_coords, sample.point_labels, sample.image_embeddings
        )
        tokens = self.config.num_mask_tokens
        rows = np.arange(len(sample.mask_index))
        index = np.clip(answers[graphs.MASK_INDEX], 0, tokens - 1)
        for tensor in PROMPT_OUTPUTS:
            expected = getattr(sample, tensor)
            if tensor != graphs.IOU_PREDICTIONS:
                # A nearly tied token that the graph selects instead was compared above.
                expected = expected[rows, index]
            self.recorder.add(graph, tensor, f"{sample.name} answers", answers[tensor], expected)

    def _decode(self, sample: GoldenSample, embeddings: np.ndarray) -> dict[str, np.ndarray]:
        session = self.sessions[graphs.PROMPT_DECODER]
        coords, labels = sample.point_coords, sample.point_labels
        return decode_all_tokens(session, self.config, coords, labels, embeddings)

    def _add_prompt_outputs(
        self, graph: str, sample: GoldenSample, outputs: Mapping[str, np.ndarray]
    ) -> None:
        for tensor in PROMPT_OUTPUTS:
            self.recorder.add(graph, tensor, sample.name, outputs[tensor], getattr(sample, tensor))
        iou, chosen = outputs[graphs.IOU_PREDICTIONS], outputs[graphs.MASK_INDEX]
        margins = choice_margins(iou, chosen, sample.mask_index)
        scale = float(np.abs(iou).max())
        self.recorder.add_choice(
            graph, MASK_INDEX, sample.name, chosen, sample.mask_index, margins, scale
        )

    def _check_text(self, text: GoldenText, picture: str, kind: str, *, whole_cache: bool) -> None:
        session, graph = self.sessions[graphs.TEXT_DECODER], graphs.TEXT_DECODER
        run = run_text(session, self.config, text, whole_cache=whole_cache)
        name = f"{kind} R={len(text.input_ids)}{' whole cache' if whole_cache else ''}"
        name = f"{picture} {name}".lstrip()
        self.recorder.add(graph, graphs.LOGITS, name, run.logit_digests, text.logit_digests)
        self.recorder.add_choice(
            graph, CAPTION_IDS, name, run.next_ids, text.next_ids, run.margins, run.scale
        )

    def _check_draws(self, text: GoldenText) -> None:
        draws = draw_tokens(self.sessions[graphs.TEXT_DECODER], self.config, text)
        name = f"drawn R={len(draws.ids)}"
        self.recorder.add_choice(
            graphs.TEXT_DECODER,
            CAPTION_IDS,
            name,
            draws.ids,
            draws.expected,
            draws.margins,
            1.0,
        )

    def _check_chain(self, sample: GoldenSample, image_embeddings: np.ndarray) -> None:
        outputs = self._decode(sample, image_embeddings)
        self._add_prompt_outputs(END_TO_END, sample, outputs)
        # A nearly tied mask may be chosen instead; compare the caption of the expected mask.
        rows, index = np.arange(len(sample.mask_index)), sample.mask_index
        tokens = outputs[graphs.SEMANTIC_TOKENS][rows, index]
        session, name = self.sessions[graphs.TEXT_DECODER], sample.name
        expected = blank_after_eos(sample.caption_ids, self.config.pad_id)
        actual = Captioner(session, self.config).generate(tokens)
        if np.array_equal(actual, expected):
            self.recorder.record(compare(END_TO_END, CAPTION_IDS, name, actual, expected, 0))
            logits = None
        else:
            logits = logits_of(session, self.config, tokens, sample.caption_ids[:, :-1])
            self.recorder.add_captions(END_TO_END, name, actual, expected, logits)
        if self.tally is not None:
            self.tally.add(sample, outputs, actual, expected, logits)


def expected_of_pipeline(
    sessions: Mapping[str, Session], config: TapConfig, sample: GoldenSample
) -> Expected:
    """Return the expected outputs of a pipeline of the same graphs.

    Errors propagate from one graph to the next, so these are the outputs of the sessions, run one
    after the other from the picture. ``verify_sessions`` compares them with the reference.

    Raises:
        SessionError: a graph fails to run.
    """
    encoded = _run(sessions[graphs.IMAGE_ENCODER], {graphs.IMAGES: sample.images[:1]})
    embeddings = encoded[graphs.IMAGE_EMBEDDINGS]
    decoder, coords, labels = (
        sessions[graphs.PROMPT_DECODER],
        sample.point_coords,
        sample.point_labels,
    )
    outputs = decode_all_tokens(decoder, config, coords, labels, embeddings)
    rows = np.arange(len(sample.mask_index))
    tokens = outputs[graphs.SEMANTIC_TOKENS][rows, sample.mask_index]
    text_decoder = sessions[graphs.TEXT_DECODER]
    logits = logits_of(text_decoder, config, tokens, sample.caption_ids[:, :-1])
    return Expected(prompt_outputs=outputs, logits=logits)


def _run(session: Session, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a graph of any float dtype on float32 inputs, and return float32 outputs."""
    return to_float32(session.run(to_spec_dtypes(session.spec, inputs)))
