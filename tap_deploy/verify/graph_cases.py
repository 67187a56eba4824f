"""The golden samples of a bundle as single runs of its graphs, for other tools to repeat."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np

from tap_deploy import graphs
from tap_deploy.bundle.golden import Golden, GoldenSample, GoldenText
from tap_deploy.bundle.variant import Variant
from tap_deploy.config import TapConfig
from tap_deploy.graphs import GraphSpec
from tap_deploy.masks import mask_rows, request_answers
from tap_deploy.sessions.caption_steps import step_inputs
from tap_deploy.sessions.contract import Session, to_spec_dtypes
from tap_deploy.sessions.opening import create_session
from tap_deploy.verify.tolerances import FP32_TOLERANCES, PROMPT_OUTPUTS, Tolerances

# Outputs that PyTorch has computed, which are fields of a sample of the same name.
FLOAT_OUTPUTS: Mapping[str, tuple[str, ...]] = {
    graphs.IMAGE_ENCODER: (graphs.IMAGE_EMBEDDINGS,),
    graphs.PROMPT_DECODER: PROMPT_OUTPUTS,
    graphs.TEXT_DECODER: (graphs.LOGITS,),
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GraphCase:
    """One run of a graph.

    Attributes:
        inputs: all inputs by name, with the dtypes of the graph.
        expected: outputs of PyTorch by name, in float32; of ``logits``, their ``logit_digest``,
            ``[P, 16]``.
    """

    inputs: Mapping[str, np.ndarray]
    expected: Mapping[str, np.ndarray]


def graph_cases(
    variant: Variant, graph: str, golden: Golden, tolerances: Tolerances
) -> list[GraphCase]:
    """Return the cases of one graph, in the order of ``case_sizes``.

    Every step of a caption is a case of the text decoder. PyTorch's caches are not in a sample, so
    the text decoder itself fills them on the CPU, as it does when a bundle is verified.

    Args:
        variant: variant of a bundle.
        graph: one of ``graphs.GRAPH_NAMES``.
        golden: the golden samples of the bundle.
        tolerances: of the precision. The choices, ``mask_index`` and ``next_ids``, are among the
            expected outputs only if they must equal those of PyTorch.

    Raises:
        SessionError: onnxruntime is missing, or the text decoder does not load or run.
    """
    spec, config = variant.specs[graph], variant.config
    if graph == graphs.IMAGE_ENCODER:
        return [_encoder_case(golden.samples[0])]
    exact = _must_be_equal(tolerances)
    if graph == graphs.PROMPT_DECODER:
        return [
            case for sample in golden.samples for case in _prompt_cases(spec, config, sample, exact)
        ]
    with create_session("onnxruntime", variant.path(graph), spec) as session:
        return list(_caption_cases(session, config, golden.captions, exact))


def case_sizes(
    graph: str, config: TapConfig, golden: Golden, tolerances: Tolerances
) -> list[dict[str, int]]:
    """Return the sizes of the dynamic axes of each case, without running a graph."""
    if graph == graphs.IMAGE_ENCODER:
        return [{"B": len(golden.samples[0].images)}]
    if graph == graphs.TEXT_DECODER:
        rows, steps = golden.captions.input_ids.shape
        return [{"P": rows, "T": position, "K": 1} for position in range(1, steps + 1)]
    sizes: list[dict[str, int]] = []
    for sample in golden.samples:
        prompts, points = sample.point_labels.shape
        tokens = [config.num_mask_tokens] + [1] * _must_be_equal(tolerances)
        sizes += [{"P": prompts, "Q": prompts, "N": points, "M": count} for count in tokens]
    return sizes


def largest_case(sizes: list[dict[str, int]]) -> int:
    """Return the index of the case with the largest inputs; the first one of several."""
    return max(range(len(sizes)), key=lambda index: math.prod(sizes[index].values()))


def output_bounds(graph: str, golden: Golden, tolerances: Tolerances) -> dict[str, float]:
    """Return the bound on the largest absolute difference of each float output.

    A relative tolerance refers to the largest magnitude in all samples.
    """
    bounds = {}
    for name in FLOAT_OUTPUTS[graph]:
        if graph == graphs.TEXT_DECODER:
            arrays = [golden.captions.logit_digests]
        else:
            arrays = [getattr(sample, name) for sample in golden.samples]
        largest = max(float(np.abs(array).max()) for array in arrays)
        bound = tolerances[name]
        bounds[name] = bound.max * (largest if bound.relative else 1.0)
    return bounds


def _must_be_equal(tolerances: Tolerances) -> bool:
    """Whether choices must be those of PyTorch: fp32 has room for near-ties only."""
    return tolerances == FP32_TOLERANCES


def _encoder_case(sample: GoldenSample) -> GraphCase:
    return GraphCase(
        inputs={graphs.IMAGES: sample.images},
        expected={graphs.IMAGE_EMBEDDINGS: sample.image_embeddings},
    )


def _prompt_cases(
    spec: GraphSpec, config: TapConfig, sample: GoldenSample, exact: bool
) -> Iterator[GraphCase]:
    """Yield a case with all mask tokens, and one with those that answer the prompts."""
    count = len(sample.point_labels)
    every = np.tile(np.arange(config.num_mask_tokens, dtype=np.int32), (count, 1))
    requests = [(every, every)]
    if exact:
        requests.append((request_answers(count), sample.mask_index[:, None].astype(np.int32)))
    for request, index in requests:  # both [P, M]
        inputs = {
            graphs.IMAGE_EMBEDDINGS: sample.image_embeddings[:1],
            graphs.POINT_COORDS: sample.point_coords,
            graphs.POINT_LABELS: sample.point_labels,
            graphs.MASK_REQUEST: request,
            graphs.MASK_ROWS: mask_rows(count),
        }
        rows = np.arange(count)[:, None]
        expected = {name: getattr(sample, name)[rows, index] for name in PROMPT_OUTPUTS}
        # The predicted IoUs are those of all tokens, whatever was requested.
        expected |= {graphs.IOU_PREDICTIONS: sample.iou_predictions, graphs.MASK_INDEX: index}
        yield GraphCase(inputs=to_spec_dtypes(spec, inputs), expected=expected)


def _caption_cases(
    session: Session, config: TapConfig, text: GoldenText, exact: bool
) -> Iterator[GraphCase]:
    """Yield the steps after the visual prefix, with PyTorch's tokens and a cache without gaps."""
    dtype = session.spec.inputs[0].dtype
    tokens = np.ascontiguousarray(text.semantic_tokens, dtype)
    steps = text.input_ids.shape[1]
    cache = np.zeros(graphs.kv_cache_shape(config, len(tokens), steps + 1), dtype)
    for position in range(steps + 1):
        given = text.input_ids[:, max(0, position - 1)]  # ignored at position 0
        filled = np.ascontiguousarray(cache[..., : max(1, position), :])
        inputs = step_inputs(config, tokens, given, position, filled)
        if position:
            expected = {graphs.LOGITS: text.logit_digests[:, position - 1]}
            if exact:
                expected[graphs.NEXT_IDS] = text.next_ids[:, position - 1].astype(np.int32)
            yield GraphCase(inputs=inputs, expected=expected)
        if position < steps:
            cache[..., position, :] = session.run(inputs)[graphs.PRESENT_KEY_VALUES]
