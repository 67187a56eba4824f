"""Explicit int8: QuantizeLinear and DequantizeLinear at the inputs of the chosen nodes.

``onnxruntime.quantization`` has a writer as well. It is not used because it handles fp32 graphs
only, quantizes biases (TensorRT refuses those), and shares Q and DQ in a way that onnxruntime does
not compute in int8; what is left of it would be less than its adapter.
"""

from __future__ import annotations

import os

import onnx_ir as ir
from onnx_ir.passes import common as passes

from tap_deploy.bundle.graph_files import load_graph
from tap_deploy.engines.calibration.table import CalibrationTable
from tap_deploy.engines.qdq.biases import separate_biases
from tap_deploy.engines.qdq.chosen_nodes import (
    QuantizationPlan,
    makes_graph_output,
    nodes_by_name,
)
from tap_deploy.engines.qdq.writer import LEVELS, REDUCED_LEVELS, QdqWriter
from tap_deploy.errors import InputError

MIN_OPSET = 19  # the first whose QuantizeLinear takes float16


def qdq_from_ranges(
    model: ir.Model | str | os.PathLike[str],
    table: CalibrationTable,
    plan: QuantizationPlan,
    *,
    float_dtype: str = "float32",
    for_cpu: bool = False,
    reduce_range: bool = False,
) -> ir.Model:
    """Return a graph in which the nodes of a plan read int8 values.

    1. Activations: symmetric int8, zero point 0, one scale per tensor; one Q and one DQ per
       tensor, which all its chosen readers share.
    2. Weights: stored as int8, with one scale per output channel and a DQ; a quarter of the size.
    3. Biases stay float.
    4. Q/DQ stand right before the node that computes in int8; everything else, the outputs of the
       graph among it, is left alone. That is where builders look for them.

    With ``for_cpu`` the same roundings take the form in which onnxruntime finds them; without, it
    computes many of the nodes in fp32 behind a DQ, slower than an fp32 graph:

    5. Every reader gets a Q and a DQ of its own.
    6. Biases stand where onnxruntime does not draw them into the product; ``separate_biases``.
    7. Q/DQ stand behind every chosen convolution too: onnxruntime convolves in int8 only if the
       result is int8. A convolution that makes an output of the graph is not quantized.

    Args:
        model: the fp32 graph, or one made of it with the same node names; it is not changed.
        table: ranges of the tensors of the fp32 graph.
        plan: the nodes.
        float_dtype: of the scales, and of what is between: ``float32``, or ``float16`` for a
            typed fp16 graph.
        for_cpu: write the form that onnxruntime's CPU provider runs in int8.
        reduce_range: give weights 64 steps on each side of zero instead of 127, which CPUs
            without VNNI multiply more quickly.

    Raises:
        InputError: the opset is too old, a node is missing or cannot be quantized, its dtype is
            another one, or a tensor has no range.
    """
    quantized = model.clone() if isinstance(model, ir.Model) else load_graph(model)
    if quantized.opset_imports[""] < MIN_OPSET:
        raise InputError(
            f"graph {quantized.graph.name} has opset {quantized.opset_imports['']}; Q/DQ needs "
            f"{MIN_OPSET}; export it again"
        )
    nodes = nodes_by_name(quantized, plan.nodes)
    if for_cpu:
        nodes = [node for node in nodes if not makes_graph_output(node)]
        separate_biases(quantized.graph, nodes)
    levels = REDUCED_LEVELS if reduce_range else LEVELS
    writer = QdqWriter(
        quantized.graph, table, float_dtype, shared=not for_cpu, weight_levels=levels
    )
    for node in nodes:
        writer.quantize_inputs(node)
        if for_cpu and node.op_type == "Conv":
            writer.quantize_output(node)
    passes.RemoveUnusedNodesPass()(quantized)
    passes.TopologicalSortPass()(quantized)
    passes.NameFixPass()(quantized)
    return quantized
