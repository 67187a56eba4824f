"""Selection of fp32 islands: the nodes of an fp16 graph that must compute in fp32."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import onnx_ir as ir

from tap_deploy.bundle.precision_record import WeightReport

FP16_MAX = float(np.finfo(np.float16).max)  # 65504
# A factor of 2 as margin, because other pictures may have larger activations than the few samples.
OVERFLOW_LIMIT = FP16_MAX / 2
# Smaller fp16 numbers are subnormal and lose relative precision.
SMALLEST_NORMAL = float(np.finfo(np.float16).tiny)  # 2**-14
# fp16 numbers above 256 are 0.25 apart: rounding an attention score (or its query and key) changes
# the attention weight by up to an eighth, and by twice that for every doubling of the score.
SCORE_LIMIT = 256.0

# Operators that do not change values.
MOVES = {"Concat", "Expand", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
MOVES |= {"Identity", "Unsqueeze"}


class Reason(str, enum.Enum):
    """Reason why a node computes in fp32; the first one that applies is recorded."""

    FOURIER = "fourier features"
    PIXELS = "pixel normalisation"
    LAYER_NORM = "layer norm statistics"
    SOFTMAX = "softmax"
    MASK = "masking addend"
    OVERFLOW = "activation near the fp16 limit"
    SCORES = "attention scores too large for fp16 steps"
    WEIGHTS = "weights beyond fp16"
    UNDERFLOW = "all values subnormal in fp16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Island:
    """A node that computes in fp32.

    Attributes:
        node: name of the node.
        op_type: its operator.
        reason: the first reason that applies.
        max_abs: largest magnitude among its measured inputs and outputs.
    """

    node: str
    op_type: str
    reason: Reason
    max_abs: float


def choose_islands(model: ir.Model, max_abs: Mapping[str, float]) -> dict[str, Island]:
    """Return the nodes that must compute in fp32, by name, in graph order.

    1. Fourier features: all nodes between a float graph input and a Sin or Cos. Angles reach tens
       of radians, where fp16 has two significant decimals.
    2. Pixel normalisation: Casts and arithmetic on uint8 pictures before the first weights. The
       means are not representable in fp16, and fp32 costs nothing here.
    3. LayerNormalization: it squares residual values in the thousands.
    4. Softmax.
    5. Masks: Where nodes that hide positions from a Softmax with a number beyond the fp16 range,
       and the nodes between them and the Softmax.
    6. Nodes with an input, output or weight within a factor of 2 of the fp16 limit. This covers all
       producers and consumers of the tensor, so it is never stored in fp16.
    7. All nodes between LayerNormalization and a Softmax whose input exceeds ``SCORE_LIMIT``:
       Softmax depends on *differences* of scores, and fp16 steps are too coarse for them.
    8. Nodes with an input, output or weight that would be entirely subnormal.

    Args:
        model: an fp32 graph with named nodes.
        max_abs: float tensor -> largest magnitude, measured on samples.
    """
    found: dict[str, Reason] = {}
    for reason, nodes in (
        (Reason.FOURIER, _fourier_nodes(model.graph)),
        (Reason.PIXELS, _pixel_nodes(model.graph)),
        (Reason.LAYER_NORM, _of_type(model.graph, "LayerNormalization")),
        (Reason.SOFTMAX, _of_type(model.graph, "Softmax")),
        (Reason.MASK, _mask_nodes(model.graph)),
        (Reason.OVERFLOW, _overflowing_nodes(model.graph, max_abs)),
        (Reason.SCORES, _score_nodes(model.graph, max_abs)),
        (Reason.WEIGHTS, _heavy_nodes(model.graph)),
        (Reason.UNDERFLOW, _subnormal_nodes(model.graph, max_abs)),
    ):
        for node in nodes:
            found.setdefault(str(node.name), reason)
    return {
        str(node.name): Island(
            node=str(node.name),
            op_type=node.op_type,
            reason=found[str(node.name)],
            max_abs=largest_magnitude(node, max_abs),
        )
        for node in model.graph
        if node.name in found
    }


def weight_report(model: ir.Model, islands: Collection[str]) -> WeightReport:
    """Count the weights of an fp32 graph that overflow or become subnormal in fp16."""
    counts = dict(num_weights=0, num_fp32=0, num_subnormal=0)
    overflowing, largest = [], 0.0
    for value in model.graph.initializers.values():
        if not is_float(value) or value.const_value is None:
            continue
        magnitude = np.abs(value.const_value.numpy())
        counts["num_weights"] += magnitude.size
        if magnitude.max(initial=0.0) > FP16_MAX:
            overflowing.append(str(value.name))
        if all(node.name in islands for node in value.consumers()):
            counts["num_fp32"] += magnitude.size
            continue
        largest = max(largest, float(magnitude.max(initial=0.0)))
        counts["num_subnormal"] += int(((magnitude > 0) & (magnitude < SMALLEST_NORMAL)).sum())
    return WeightReport(**counts, overflowing=tuple(overflowing), largest=largest)


def largest_magnitude(node: ir.Node, max_abs: Mapping[str, float]) -> float:
    """Return the largest magnitude among the measured inputs and outputs of a node."""
    return max((max_abs.get(str(value.name), 0.0) for value in _floats_of(node)), default=0.0)


def weight_magnitude(value: ir.Value) -> float:
    """Return the largest magnitude of an initializer."""
    assert value.const_value is not None
    return float(np.abs(value.const_value.numpy()).max(initial=0.0))


def is_float(value: ir.Value | None) -> bool:
    """Whether a value is float32."""
    return value is not None and value.dtype == ir.DataType.FLOAT


def _floats_of(node: ir.Node) -> Iterable[ir.Value]:
    return (v for v in (*node.inputs, *node.outputs) if v is not None and is_float(v))


def _weights_of(node: ir.Node) -> Iterable[ir.Value]:
    return (v for v in node.inputs if v is not None and v.is_initializer() and is_float(v))


def _of_type(graph: ir.Graph, op_type: str) -> list[ir.Node]:
    return [node for node in graph if node.op_type == op_type]


def _fourier_nodes(graph: ir.Graph) -> list[ir.Node]:
    found: set[ir.Node] = set()
    for node in [*_of_type(graph, "Sin"), *_of_type(graph, "Cos")]:
        _walk_back(node, found, stop=())
    return [node for node in graph if node in found]


def _walk_back(node: ir.Node, found: set[ir.Node], stop: Iterable[str]) -> None:
    """Collect a node and its float producers recursively, except operators in ``stop``."""
    if node in found:
        return
    found.add(node)
    for value in node.inputs:
        producer = value.producer() if value is not None and is_float(value) else None
        if producer is not None and producer.op_type not in stop:
            _walk_back(producer, found, stop)


def _pixel_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Return Casts of uint8 inputs and the arithmetic after them, up to the first weights."""
    found: set[ir.Node] = set()
    for node in graph:
        first = node.inputs[0] if node.inputs else None
        if first is None:
            continue
        is_cast = node.op_type == "Cast" and first.dtype == ir.DataType.UINT8
        if is_cast or (node.op_type in ("Sub", "Mul", "Div") and first.producer() in found):
            found.add(node)
    return [node for node in graph if node in found]


def _mask_nodes(graph: ir.Graph) -> list[ir.Node]:
    found: set[ir.Node] = set()
    for node in graph:
        hides = node.op_type == "Where" and any(
            weight_magnitude(weight) > FP16_MAX for weight in _weights_of(node)
        )
        carries = any(v is not None and v.producer() in found for v in node.inputs)
        if hides or (carries and node.op_type != "Softmax"):
            found.add(node)
        if carries and node.op_type == "MatMul":
            return []  # not a mask of a Softmax: leave it to the measured maxima
    return [node for node in graph if node in found]


def _overflowing_nodes(graph: ir.Graph, max_abs: Mapping[str, float]) -> list[ir.Node]:
    return [node for node in graph if largest_magnitude(node, max_abs) > OVERFLOW_LIMIT]


def _score_nodes(graph: ir.Graph, max_abs: Mapping[str, float]) -> list[ir.Node]:
    found: set[ir.Node] = set()
    for softmax in _of_type(graph, "Softmax"):
        scores = softmax.inputs[0]
        if scores is not None and _true_scores(scores, max_abs) > SCORE_LIMIT:
            _collect_scores(scores, found)
    return [node for node in graph if node in found]


def _true_scores(scores: ir.Value, max_abs: Mapping[str, float]) -> float:
    """Return the largest attention score without the huge numbers of a masking addend."""
    largest = max_abs.get(str(scores.name), 0.0)
    producer = scores.producer()
    if largest < np.finfo(np.float32).max / 2 or producer is None:
        return largest
    inputs = [value for value in producer.inputs if value is not None and is_float(value)]
    return max(
        (
            _true_scores(value, max_abs)
            for value in inputs
            if producer.op_type != "Where" and not value.is_initializer()
        ),
        default=0.0,
    )


def _collect_scores(value: ir.Value | None, found: set[ir.Node]) -> bool:
    """Collect the nodes that compute a value, back to LayerNormalization.

    Nodes that only move fp16 values stay fp16: fp32 would add no precision, and the KV cache of the
    text decoder is large.

    Returns:
        Whether the value is computed in fp32.
    """
    producer = None if value is None or not is_float(value) else value.producer()
    if producer is None:
        return False
    if producer.op_type in ("LayerNormalization", "Softmax") or producer in found:
        return True
    came_exact = [_collect_scores(source, found) for source in producer.inputs]
    if producer.op_type in MOVES and not any(came_exact):
        return False
    found.add(producer)
    return True


def _heavy_nodes(graph: ir.Graph) -> list[ir.Node]:
    return [
        node
        for node in graph
        if any(weight_magnitude(w) > OVERFLOW_LIMIT for w in _weights_of(node))
    ]


def _subnormal_nodes(graph: ir.Graph, max_abs: Mapping[str, float]) -> list[ir.Node]:
    return [
        node
        for node in graph
        if any(0 < weight_magnitude(w) < SMALLEST_NORMAL for w in _weights_of(node))
        or any(0 < max_abs.get(str(v.name), 0.0) < SMALLEST_NORMAL for v in _floats_of(node))
    ]
