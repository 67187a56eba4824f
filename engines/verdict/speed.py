"""Timing of the graphs and of the whole pipeline, candidates in turns, on realistic inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from tap_deploy import graphs
from tap_deploy.config import BOS_ID, TapConfig
from tap_deploy.engines.verdict.agreement import Case, Sessions
from tap_deploy.image import load_image, model_image
from tap_deploy.masks import mask_rows, request_answers
from tap_deploy.predictor import TapPredictor
from tap_deploy.sessions.caption_steps import CaptionSteps
from tap_deploy.sessions.contract import Session
from tap_deploy.timing import MIN_ITERATIONS, MIN_SECONDS, WARM_UP_SECONDS, Latency, measure

WHOLE = "whole"
PROMPTS_PER_CALL = 16

Call = Callable[[], object]
# Returns graph name -> a call that runs the graph on the inputs in another runtime, and optionally
# ``WHOLE`` -> a call that runs the whole pipeline.
OtherRuntime = Callable[["SpeedInputs"], Mapping[str, Call]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """Duration of the timing of each candidate.

    Attributes:
        min_iterations: minimum number of calls.
        min_seconds: minimum total duration, seconds.
        warm_up_seconds: minimum duration of the warm-up, seconds.
    """

    min_iterations: int = MIN_ITERATIONS
    min_seconds: float = MIN_SECONDS
    warm_up_seconds: float = WARM_UP_SECONDS


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SpeedInputs:
    """Inputs of the timed calls, the same for all candidates.

    Attributes:
        case: picture and prompts for the whole pipeline.
        images: picture in the model frame, uint8 BGR ``[1, S, S, 3]``.
        image_embeddings: embeddings from the reference, float32 ``[1, C, grid, grid]``.
        point_coords: points in pixels of the model frame, float32 ``[16, N, 2]``.
        point_labels: codes of ``PointLabel``, int32 ``[16, N]``.
        semantic_tokens: semantic token of the first prompt from the reference, float32 ``[1, C]``.
        num_tokens: length of the caption, tokens.
    """

    case: Case
    images: np.ndarray
    image_embeddings: np.ndarray
    point_coords: np.ndarray
    point_labels: np.ndarray
    semantic_tokens: np.ndarray
    num_tokens: int

    @classmethod
    def from_case(cls, sessions: Sessions, config: TapConfig, case: Case) -> SpeedInputs:
        """Compute the inputs of each graph with the reference."""
        images, frame = model_image(load_image(case.image), config.image_size)
        predictor = TapPredictor(sessions, config)
        encoded = predictor.encode(case.image)
        regions = predictor.predict(encoded, prompts=case.prompts, masks=False, captions=False)
        rows = np.resize(np.arange(len(case.prompts)), PROMPTS_PER_CALL)
        return cls(
            case=case,
            images=images,
            image_embeddings=encoded.image_embeddings,
            point_coords=np.ascontiguousarray(case.prompts.model_coords(frame.scale)[rows]),
            point_labels=np.ascontiguousarray(case.prompts.labels[rows]),
            semantic_tokens=np.ascontiguousarray(regions.semantic_tokens[:1]),
            num_tokens=config.max_new_tokens,
        )

    @property
    def mask_request(self) -> np.ndarray:
        """Request for the answering token of each prompt, int32 ``[16, 1]``."""
        return request_answers(len(self.point_labels))

    @property
    def mask_rows(self) -> np.ndarray:
        """All prompts, int32 ``[16]``."""
        return mask_rows(len(self.point_labels))


def measure_graphs(
    candidates: Mapping[str, Sessions],
    config: TapConfig,
    inputs: SpeedInputs,
    options: SpeedOptions,
    *,
    others: Mapping[str, OtherRuntime] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Latency]]:
    """Time every graph of every candidate in turns.

    Args:
        candidates: name -> one session per graph, in any precision.
        config: sizes of the model.
        inputs: inputs of the calls.
        options: duration of the timing.
        others: name -> another runtime to time in the same run, such as PyTorch.
        on_stage: called with the name of each graph before it is timed.

    Returns:
        Graph name -> name of the candidate -> latency.
    """
    elsewhere = {name: runtime(inputs) for name, runtime in (others or {}).items()}
    found = {}
    for graph in graphs.GRAPH_NAMES:
        if on_stage is not None:
            on_stage(graph)
        calls = {n: _call(sessions[graph], config, inputs) for n, sessions in candidates.items()}
        calls |= {name: calls_of[graph] for name, calls_of in elsewhere.items()}
        found[graph] = _measure(calls, options)
    return found


def measure_whole(
    candidates: Mapping[str, Sessions],
    config: TapConfig,
    inputs: SpeedInputs,
    options: SpeedOptions,
    *,
    others: Mapping[str, OtherRuntime] | None = None,
) -> dict[str, Latency]:
    """Time the whole pipeline from picture to masks and captions.

    Arguments as in ``measure_graphs``; sessions must have float32 inputs and outputs. Other
    runtimes are included if they provide ``WHOLE``.
    """
    calls: dict[str, Call] = {}
    for name, sessions in candidates.items():
        calls[name] = _whole(TapPredictor(sessions, config), inputs.case)
    for name, runtime in (others or {}).items():
        if WHOLE in (calls_of := runtime(inputs)):
            calls[name] = calls_of[WHOLE]
    return _measure(calls, options)


def _measure(calls: Mapping[str, Call], options: SpeedOptions) -> dict[str, Latency]:
    return measure(
        calls,
        min_iterations=options.min_iterations,
        min_seconds=options.min_seconds,
        warm_up_seconds=options.warm_up_seconds,
    )


def _whole(predictor: TapPredictor, case: Case) -> Call:
    return lambda: predictor.predict(case.image, prompts=case.prompts)


def _call(session: Session, config: TapConfig, inputs: SpeedInputs) -> Call:
    if session.spec.name == graphs.TEXT_DECODER:
        return lambda: write_caption(session, config, inputs.semantic_tokens, inputs.num_tokens)
    feeds = {spec.name: _feed(inputs, spec.name, spec.dtype) for spec in session.spec.inputs}
    return lambda: session.run(feeds)


def _feed(inputs: SpeedInputs, name: str, dtype: str) -> np.ndarray:
    array: np.ndarray = getattr(inputs, name)
    return array.astype(dtype, copy=False)


def write_caption(
    session: Session, config: TapConfig, semantic_tokens: np.ndarray, num_tokens: int
) -> np.ndarray:
    """Decode a fixed number of tokens regardless of EOS, so that all candidates do equal work.

    Returns:
        Ids of the first row, int32 ``[num_tokens]``.
    """
    steps = CaptionSteps(session, config, semantic_tokens)
    ids = np.full(len(semantic_tokens), BOS_ID, np.int32)
    written = np.empty(num_tokens, np.int32)
    for position in range(num_tokens):
        ids = steps.step(ids)
        written[position] = ids[0]
    return written
