"""Selection of the nodes of a graph to quantize."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from tap_deploy.bundle.variant import Variant
from tap_deploy.errors import InputError

WEIGHTED = ("MatMul", "Gemm", "Conv")
# Matrix products of two activations (attention) and residual sums; quantized only on request.
OPTIONAL = ("MatMul", "Add")
_LAYOUT = ("Reshape", "Transpose")
# Modules that stay in higher precision by default, because their quantization is not known to be
# harmless: the patch embedding (0.6 % of the encoder's work, and the start of its residual stream),
# the Fourier features of the points, and the small heads for masks, scores and names. The large
# vocabulary head, text_proj, is most of the weights that a caption step reads, and int8 was shown
# to be harmless there (docs/int8.md).
SENSITIVE = (
    "patch_embed",
    "prompt_encoder",
    "decoder.mask_pred",
    "decoder.iou_pred",
    "decoder.sem_pred",
    "upscaler",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChosenNodes:
    """The nodes to quantize in one graph.

    Attributes:
        graph: name of the graph.
        nodes: names of nodes of the fp32 graph: MatMul, Gemm and Conv with constant weights, and
            optionally MatMul and Add of two activations.

    Raises:
        InputError: duplicate name.
    """

    graph: str
    nodes: tuple[str, ...]

    def __post_init__(self) -> None:
        twice = {name for name in self.nodes if self.nodes.count(name) > 1}
        if twice:
            raise InputError(f"nodes to quantize in {self.graph}: {min(twice)} is listed twice")

    @classmethod
    def default(
        cls, model: ir.Model, *, attention: bool = False, residuals: bool = False
    ) -> ChosenNodes:
        """Return ``default_nodes`` and, on request, more nodes.

        Args:
            model: the fp32 graph.
            attention: whether to add ``attention_nodes``.
            residuals: whether to add ``residual_nodes``.
        """
        nodes = default_nodes(model)
        if attention:
            nodes += attention_nodes(model)
        if residuals:
            nodes += residual_nodes(model)
        return cls(graph=str(model.graph.name), nodes=nodes)


def default_nodes(model: ir.Model) -> tuple[str, ...]:
    """Return the names of all Linear layers and convolutions that are not ``SENSITIVE``."""
    return tuple(
        str(node.name)
        for node in model.graph
        if has_constant_weight(node) and not str(node.name).startswith(SENSITIVE)
    )


def attention_nodes(model: ir.Model) -> tuple[str, ...]:
    """Return the names of the matrix products of two activations before and after a Softmax.

    Quantizing their inputs puts Q/DQ on q, k, v and the softmax, the pattern that TensorRT fuses to
    int8 attention.
    """
    return tuple(
        str(node.name)
        for node in model.graph
        if node.op_type == "MatMul"
        and not has_constant_weight(node)
        and not _is_table_row(node.inputs[1])
        and not str(node.name).startswith(SENSITIVE)
    )


def _is_table_row(value: ir.Value | None) -> bool:
    """Whether a value is gathered from a constant table, as rotary embeddings are."""
    producer = None if value is None else value.producer()
    if producer is None:
        return False
    source = producer.inputs[0]
    if producer.op_type == "Gather":
        return source is not None and source.is_initializer()
    return producer.op_type in (*_LAYOUT, "Squeeze", "Cast") and _is_table_row(source)


def residual_nodes(model: ir.Model) -> tuple[str, ...]:
    """Return the names of the residual sums.

    A residual sum is an Add of two activations whose result is read, possibly after a change of
    layout, by a LayerNormalization or the next Add of two activations.
    """
    return tuple(
        str(node.name)
        for node in model.graph
        if _adds_activations(node)
        and not str(node.name).startswith(SENSITIVE)
        and any(
            reader.op_type == "LayerNormalization" or _adds_activations(reader)
            for reader in _readers(node)
        )
    )


def _adds_activations(node: ir.Node) -> bool:
    return node.op_type == "Add" and not any(
        value is None or value.is_initializer() for value in node.inputs
    )


def _readers(node: ir.Node) -> list[ir.Node]:
    """Return the consumers of a node's output, looking through changes of layout."""
    found: list[ir.Node] = []
    for usage in node.outputs[0].uses():
        found += _readers(usage.node) if usage.node.op_type in _LAYOUT else [usage.node]
    return found


def has_constant_weight(node: ir.Node) -> bool:
    """Whether a node multiplies an activation by an initializer."""
    if node.op_type not in WEIGHTED:
        return False
    data, weight = node.inputs[0], node.inputs[1]
    return (
        data is not None
        and not data.is_initializer()
        and weight is not None
        and weight.is_initializer()
    )


def activation_inputs(node: ir.Node) -> list[tuple[int, ir.Value]]:
    """Return position and value of the activation inputs of a node that get quantized.

    Raises:
        InputError: the node cannot be quantized.
    """
    values = list(enumerate(node.inputs))
    if has_constant_weight(node):
        values = values[:1]
    elif node.op_type not in OPTIONAL:
        raise InputError(
            f"node {node.name} is a {node.op_type}; expected MatMul, Gemm or Conv with constant "
            "weights, or a MatMul or an Add of activations"
        )
    return [(i, v) for i, v in values if v is not None and not v.is_initializer()]


def makes_graph_output(node: ir.Node) -> bool:
    """Whether a node is a convolution whose output is an output of the graph."""
    return node.op_type == "Conv" and node.outputs[0].is_graph_output()


def weight_channel_axis(node: ir.Node) -> int:
    """Return the output channel axis of the weight of a MatMul, Gemm or Conv."""
    if node.op_type == "Conv" or (
        node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    ):
        return 0
    weight = node.inputs[1]
    return 1 if weight is None or weight.shape is None else len(weight.shape) - 1


def tensors_to_calibrate(model: ir.Model, nodes: tuple[str, ...]) -> set[str]:
    """Return the names of the activations whose ranges the nodes need.

    These are the inputs of the nodes and the outputs of convolutions, which onnxruntime needs in
    int8.

    Raises:
        InputError: a node does not exist or cannot be quantized.
    """
    chosen = nodes_by_name(model, nodes)
    read = {str(value.name) for node in chosen for _, value in activation_inputs(node)}
    made = {str(n.outputs[0].name) for n in chosen if n.op_type == "Conv"}
    outputs = {str(n.outputs[0].name) for n in chosen if makes_graph_output(n)}
    return read | (made - outputs)


def nodes_by_name(model: ir.Model, names: tuple[str, ...]) -> list[ir.Node]:
    """Return the named nodes, in the order of the graph.

    Raises:
        InputError: a node does not exist.
    """
    found = {str(node.name): node for node in model.graph}
    missing = [name for name in names if name not in found]
    if missing:
        raise InputError(f"graph {model.graph.name} has no node {missing[0]!r}; see default_nodes")
    wanted = set(names)
    return [node for name, node in found.items() if name in wanted]


def default_selection(
    variant: Variant, *, attention: bool = False, residuals: bool = False
) -> dict[str, ChosenNodes]:
    """Return the nodes to quantize in every fp32 graph; see ``ChosenNodes.default``."""
    return {
        name: ChosenNodes.default(variant.load(name), attention=attention, residuals=residuals)
        for name in variant.specs
    }


def tensors_of_selection(
    variant: Variant, selected: Mapping[str, ChosenNodes]
) -> dict[str, set[str]]:
    """Return the tensors whose ranges the selected nodes need, by graph.

    Raises:
        InputError: a node does not exist or cannot be quantized.
    """
    return {
        name: tensors_to_calibrate(variant.load(name), chosen.nodes)
        for name, chosen in selected.items()
    }
