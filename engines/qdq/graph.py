"""Explicit int8 quantization: QuantizeLinear and DequantizeLinear at the inputs of chosen nodes.

``onnxruntime.quantization`` is not used: it only handles fp32 graphs, quantizes biases (which
TensorRT rejects), and shares Q and DQ in a way that onnxruntime does not run in int8. Adapting it
would take more code than this module.
"""

from __future__ import annotations

import os

import onnx_ir as ir
from onnx_ir.passes import common as passes

from tap_deploy.bundle.graph_files import load_graph
from tap_deploy.engines.calibration.table import CalibrationTable
from tap_deploy.engines.qdq.biases import separate_biases
from tap_deploy.engines.qdq.chosen_nodes import (
    ChosenNodes,
    makes_graph_output,
    nodes_by_name,
)
from tap_deploy.engines.qdq.writer import LEVELS, REDUCED_LEVELS, QdqWriter
from tap_deploy.errors import InputError

MIN_OPSET = 19  # first opset whose QuantizeLinear accepts float16


def qdq_from_ranges(
    model: ir.Model | str | os.PathLike[str],
    table: CalibrationTable,
    chosen: ChosenNodes,
    *,
    float_dtype: str = "float32",
    for_cpu: bool = False,
    reduce_range: bool = False,
) -> ir.Model:
    """Return a copy of a graph in which the chosen nodes read int8 values.

    1. Activations: symmetric int8, zero point 0, one scale per tensor; all quantized consumers of
       a tensor share one Q and one DQ.
    2. Weights: stored as int8 with one scale per output channel and a DQ; a quarter of the size.
    3. Biases stay float.
    4. Q/DQ are placed directly before the quantized node, where engine builders expect them.
       Everything else, including the outputs of the graph, is unchanged.

    ``for_cpu`` writes the same rounding in a form that onnxruntime runs in int8; otherwise it runs
    many of the nodes in fp32 after a DQ, which is slower than an fp32 graph:

    5. Every consumer has its own Q and DQ.
    6. Biases are placed where onnxruntime does not fuse them; see ``separate_biases``.
    7. Q/DQ also follow every quantized convolution, because onnxruntime only runs a convolution in
       int8 if its output is int8. A convolution that produces a graph output is not quantized.

    Args:
        model: the fp32 graph, or one derived from it with the same node names; not modified.
        table: ranges of the tensors of the fp32 graph.
        chosen: nodes to quantize.
        float_dtype: dtype of the scales and of the float tensors: ``float32``, or ``float16`` for a
            typed fp16 graph.
        for_cpu: write the form for onnxruntime's CPU provider.
        reduce_range: use 64 steps on each side of zero for weights instead of 127, which is faster
            on CPUs without VNNI.

    Raises:
        InputError: the opset is too old, a node is missing or cannot be quantized, a tensor has an
            unexpected dtype or has no range.
    """
    quantized = model.clone() if isinstance(model, ir.Model) else load_graph(model)
    if quantized.opset_imports[""] < MIN_OPSET:
        raise InputError(
            f"graph {quantized.graph.name} has opset {quantized.opset_imports['']}; Q/DQ needs "
            f"{MIN_OPSET}; export it again"
        )
    nodes = nodes_by_name(quantized, chosen.nodes)
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
