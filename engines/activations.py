"""How much of its activations a graph moves and keeps, in elements: estimates, not measurements.

A builder fuses what is element-wise into the products before it, and an attention into one
kernel. So only what products and normalisations read and write is counted as traffic; and a node
that may work in place takes no memory of its own.
"""

from __future__ import annotations

import onnx_ir as ir

from tap_deploy.engines.products import PRODUCT_OPS, elements

_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_IN_PLACE = (
    *("Add", "Sub", "Mul", "Div", "Where", "Clip", "Cast", "Neg"),
    *("Gelu", "Relu", "Erf", "Softmax", "LayerNormalization"),
)
# Between the two products of an attention.
_ATTENTION_OPS = (
    *("Add", "Mul", "Where", "Concat", "Slice", "Cast", "Softmax"),
    *("QuantizeLinear", "DequantizeLinear"),
)


def traffic_elements(graph: ir.Graph) -> int:
    """Return how many elements of activations are read from and written to DRAM in one call."""
    total = 0
    for node in graph:
        if node.op_type in PRODUCT_OPS or node.op_type == "LayerNormalization":
            read = [value for value in node.inputs if value is not None and not _is_constant(value)]
            total += sum(elements(value) for value in read if not _comes_from_softmax(value))
            if not _goes_to_softmax(node.outputs[0]):
                total += elements(node.outputs[0])
        elif node.op_type == "Gather":
            total += elements(node.outputs[0])
    return total


def peak_elements(graph: ir.Graph) -> int:
    """Return the most elements of activations that are alive at once, when run in order.

    Scores of attentions count, as not every builder fuses every attention.
    """
    buffers: dict[ir.Value, int] = {}  # value -> buffer
    sizes: list[int] = []
    uses: list[int] = []  # reads of a buffer that are still to come
    live = peak = 0

    def allocate(value: ir.Value) -> None:
        nonlocal live
        buffers[value] = len(sizes)
        sizes.append(elements(value))
        uses.append(_uses(graph, value))
        live += sizes[-1]

    for value in graph.inputs:
        allocate(value)
    for node in graph:
        read = [value for value in node.inputs if value is not None and value in buffers]
        for value in read:
            uses[buffers[value]] -= 1
        for output in node.outputs:
            shared = _shared_buffer(node, output, buffers, uses)
            if shared is None:
                allocate(output)
            else:
                buffers[output] = shared
                uses[shared] += _uses(graph, output)
        peak = max(peak, live)
        for buffer in {buffers[value] for value in (*read, *node.outputs)}:
            if uses[buffer] == 0:
                live -= sizes[buffer]
                sizes[buffer] = 0
    return peak


def _shared_buffer(
    node: ir.Node, output: ir.Value, buffers: dict[ir.Value, int], uses: list[int]
) -> int | None:
    """Return the buffer of an input that an output may take over, if any."""
    for value in node.inputs:
        if value is None or value not in buffers:
            continue
        is_free = uses[buffers[value]] == 0 and elements(value) == elements(output)
        if node.op_type in _VIEWS or (node.op_type in _IN_PLACE and is_free):
            return buffers[value]
    return None


def _uses(graph: ir.Graph, value: ir.Value) -> int:
    """Return how often a value is read; outputs of the graph are kept for ever."""
    return len(value.uses()) + (value in graph.outputs)


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() or value.const_value is not None


def _goes_to_softmax(value: ir.Value) -> bool:
    consumers = [use.node for use in value.uses()]
    return any(
        node.op_type == "Softmax"
        or (node.op_type in _ATTENTION_OPS and _goes_to_softmax(node.outputs[0]))
        for node in consumers
    )


def _comes_from_softmax(value: ir.Value) -> bool:
    producer = value.producer()
    if producer is None or producer.op_type not in _ATTENTION_OPS:
        return False
    return producer.op_type == "Softmax" or any(
        _comes_from_softmax(source) for source in producer.inputs if source is not None
    )
