"""Rewrites biases so that onnxruntime does not fuse them into int8 matrix products."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

RANK = 3


def separate_biases(graph: ir.Graph, nodes: Iterable[ir.Node]) -> None:
    """Rewrite the biases of Linear layers that will be quantized, in place.

    onnxruntime computes ``DQ, DQ -> Gemm`` in int8 only if the Gemm has no bias or an int8 bias.
    Otherwise it dequantizes the weights in every call, which is slower than fp32. A quantized bias
    is not an option, because TensorRT rejects it.

    1. ``Gemm(x, w, b)`` becomes ``Add(Gemm(x, w), b)``.
    2. onnxruntime fuses ``Add(MatMul(x, w), b)`` to a Gemm if all axes of x are static. A bias of
       shape ``[1, 1, N]`` prevents that without changing the sum. With a dynamic axis nothing is
       changed, because a 1-D bias can still fuse with a following Gelu.

    TensorRT fuses both forms.

    Args:
        graph: graph of the nodes.
        nodes: nodes that will be quantized; only Gemm and MatMul are rewritten.
    """
    for node in nodes:
        if node.op_type == "Gemm":
            _split_gemm(graph, node)
        elif node.op_type == "MatMul":
            _unflatten_bias(graph, node)


def _split_gemm(graph: ir.Graph, node: ir.Node) -> None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return
    output = node.outputs[0]
    node.resize_inputs(2)
    add = ir.node("Add", [output, bias], name=f"{node.name}/Add")
    total = add.outputs[0]
    total.shape, total.type = output.shape, output.type
    output.replace_all_uses_with(total, replace_graph_outputs=True)
    add.replace_input_with(0, output)
    # The sum keeps the name, by which consumers and the calibration refer to it.
    total.name, output.name = output.name, f"{output.name}.product"
    graph.insert_after(node, add)


def _unflatten_bias(graph: ir.Graph, node: ir.Node) -> None:
    output, readers = node.outputs[0], list(node.outputs[0].uses())
    known = output.shape is not None and len(output.shape) == RANK and output.shape.is_static()
    if not known or len(readers) != 1 or readers[0].node.op_type != "Add":
        return
    add = readers[0].node
    position = 1 - readers[0].idx
    bias = add.inputs[position]
    if bias is None or bias.const_value is None or bias.const_value.shape.rank() != 1:
        return
    name = f"{bias.name}.{RANK}d"
    if name not in graph.initializers:
        values = bias.const_value.numpy().reshape(1, 1, -1)
        tensor = ir.tensor(values, name=name)
        value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        graph.register_initializer(value)
    add.replace_input_with(position, graph.initializers[name])
