"""How long the graphs take, candidates in turns, on inputs that occur in use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from tap_deploy import graphs
from tap_deploy.config import BOS_ID, TapConfig
from tap_deploy.engines.verdict.agreement import Case, Sessions
from tap_deploy.image import load_image, model_image
from tap_deploy.masks import request_answers
from tap_deploy.predictor import TapPredictor
from tap_deploy.sessions.caption_steps import CaptionSteps
from tap_deploy.sessions.contract import Session
from tap_deploy.timing import MIN_ITERATIONS, MIN_SECONDS, WARM_UP_SECONDS, Latency, measure

WHOLE = "whole"
PROMPTS_PER_CALL = 16

Call = Callable[[], object]
# Graph -> a call that does in another runtime what the graph does on these inputs; and under
# ``WHOLE``, if it can, one for the whole way.
OtherRuntime = Callable[["SpeedInputs"], Mapping[str, Call]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """How long to measure each candidate."""

    min_iterations: int = MIN_ITERATIONS
    min_seconds: float = MIN_SECONDS
    warm_up_seconds: float = WARM_UP_SECONDS


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SpeedInputs:
    """What all candidates are timed on.

    Attributes:
        case: picture and prompts of the whole.
        images: uint8 ``[1, S, S, 3]`` BGR, the picture in the model frame.
        image_embeddings: float32 ``[1, C, grid, grid]``, the reference's.
        point_coords: float32 ``[16, N, 2]``, model frame.
        point_labels: int32 ``[16, N]``.
        semantic_tokens: float32 ``[1, C]``, the reference's for the first prompt.
        num_tokens: tokens of the caption that is written.
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
        """Ask the reference for what comes between the graphs."""
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
        """Ask for the token that answers, int32 ``[16, 1]``."""
        return request_answers(len(self.point_labels))


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
        candidates: name -> a session per graph, in whatever precision.
        config: sizes of the model.
        inputs: what to run.
        options: how long to measure.
        others: name -> another runtime to stand in the same run, such as PyTorch.
        on_stage: called before each graph with its name.

    Returns:
        graph name -> name of the candidate -> latency.
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
    """Time the whole way from picture to masks and captions; sessions with float32 borders.

    Arguments as in ``measure_graphs``. Other runtimes stand in the same run if they can do it.
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
    """Decode a fixed number of tokens, with no early end, so that all candidates do the same.

    Returns:
        ids int32 ``[num_tokens]`` of the first row.
    """
    steps = CaptionSteps(session, config, semantic_tokens)
    ids = np.full(len(semantic_tokens), BOS_ID, np.int32)
    written = np.empty(num_tokens, np.int32)
    for position in range(num_tokens):
        ids = steps.step(ids)
        written[position] = ids[0]
    return written
