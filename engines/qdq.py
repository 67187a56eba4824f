"""Explicit int8: QuantizeLinear and DequantizeLinear at the inputs of the chosen nodes.

``onnxruntime.quantization`` has a writer as well. It is not used because it handles fp32 graphs
only, quantizes biases (TensorRT refuses those), wants to infer shapes on a copy of the model on
disk, and pairs every consumer with a Q of its own; what is left is less than its adapter.
"""

from __future__ import annotations

import os

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from tap_deploy.engines.calibration_table import CalibrationTable
from tap_deploy.engines.quantization_plan import (
    QuantizationPlan,
    activation_inputs,
    default_nodes,
    has_constant_weight,
    nodes_by_name,
)
from tap_deploy.engines.quantized_weights import quantized_weight, scales_from_amax
from tap_deploy.errors import InputError

__all__ = ["QuantizationPlan", "default_nodes", "qdq_from_ranges"]

MIN_OPSET = 19  # the first whose QuantizeLinear takes float16


def qdq_from_ranges(
    model: ir.Model | str | os.PathLike[str],
    table: CalibrationTable,
    plan: QuantizationPlan,
    *,
    float_dtype: str = "float32",
) -> ir.Model:
    """Return a graph in which the nodes of a plan read int8 values.

    1. Activations: symmetric int8, zero point 0, one scale per tensor; one Q and one DQ per
       tensor, which all its chosen consumers share.
    2. Weights: stored as int8, with one scale per output channel and a DQ; a quarter of the size.
    3. Biases stay as they are.
    4. Q/DQ stand right before the node that computes in int8; everything else, the outputs of the
       graph among it, is left alone. That is where TensorRT and onnxruntime look for them.

    Args:
        model: the fp32 graph, or one made of it with the same node names; it is not changed.
        table: ranges of the tensors of the fp32 graph.
        plan: the nodes.
        float_dtype: of the scales, and of what is between: ``float32``, or ``float16`` for a
            typed fp16 graph.

    Raises:
        InputError: the opset is too old, a node is missing or cannot be quantized, its dtype is
            another one, or a tensor has no range.
    """
    quantized = model.clone() if isinstance(model, ir.Model) else ir.load(model)
    if quantized.opset_imports[""] < MIN_OPSET:
        raise InputError(
            f"graph {quantized.graph.name} has opset {quantized.opset_imports['']}; Q/DQ needs "
            f"{MIN_OPSET}; export it again"
        )
    writer = _Writer(quantized.graph, table, float_dtype)
    for node in nodes_by_name(quantized, plan.nodes):
        writer.quantize(node)
    passes.RemoveUnusedNodesPass()(quantized)
    passes.TopologicalSortPass()(quantized)
    return quantized


def weight_channel_axis(node: ir.Node) -> int:
    """Return the axis of the output channels in the weight of a MatMul, Gemm or Conv."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0):
        return 0
    weight = node.inputs[1]
    return 1 if weight is None or weight.shape is None else len(weight.shape) - 1


class _Writer:
    """Adds Q/DQ to a graph; keeps those that are there already."""

    def __init__(self, graph: ir.Graph, table: CalibrationTable, float_dtype: str) -> None:
        self.graph, self.table, self.float_dtype = graph, table, float_dtype
        self._activations: dict[ir.Value, ir.Value] = {}
        self._weights: dict[tuple[ir.Value, int], ir.Value] = {}
        self._zero = self._initializer("zero_point.int8", np.zeros((), np.int8))

    def quantize(self, node: ir.Node) -> None:
        weighted = has_constant_weight(node)
        for position, value in activation_inputs(node):
            node.replace_input_with(position, self._activation(node, value))
        if weighted:
            weight = node.inputs[1]
            assert weight is not None
            node.replace_input_with(1, self._weight(weight, weight_channel_axis(node)))

    def _activation(self, node: ir.Node, value: ir.Value) -> ir.Value:
        if value in self._activations:
            return self._activations[value]
        self._require_dtype(node, value)
        name = str(value.name)
        amax = self.table.ranges[self._calibrated_name(node, value)]
        scale = self._initializer(f"{name}.scale", scales_from_amax(amax, self.float_dtype))
        q = ir.node("QuantizeLinear", [value, scale, self._zero], name=f"{name}/QuantizeLinear")
        dq = ir.node(
            "DequantizeLinear",
            [q.outputs[0], scale, self._zero],
            name=f"{name}/DequantizeLinear",
        )
        _describe(q, f"{name}.int8", ir.DataType.INT8, value.shape)
        _describe(dq, f"{name}.dequantized", value.dtype, value.shape)
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], [q, dq])
        else:
            self.graph.insert_after(producer, [q, dq])
        self._activations[value] = dq.outputs[0]
        return dq.outputs[0]

    def _weight(self, weight: ir.Value, axis: int) -> ir.Value:
        if (weight, axis) in self._weights:
            return self._weights[weight, axis]
        assert weight.const_value is not None
        values, scales = quantized_weight(weight.const_value.numpy(), axis, self.float_dtype)
        name = str(weight.name)
        inputs = [
            self._initializer(f"{name}.int8", values),
            self._initializer(f"{name}.scale", scales),
            self._initializer(f"{name}.zero_point", np.zeros(scales.shape, np.int8)),
        ]
        dq = ir.node(
            "DequantizeLinear", inputs, attributes={"axis": axis}, name=f"{name}/DequantizeLinear"
        )
        _describe(dq, f"{name}.dequantized", weight.dtype, weight.shape)
        self.graph.insert_before(self.graph[0], dq)
        self._weights[weight, axis] = dq.outputs[0]
        return dq.outputs[0]

    def _calibrated_name(self, node: ir.Node, value: ir.Value) -> str:
        """Name of the tensor in the fp32 graph: a typed graph has casts in between."""
        source: ir.Value | None = value
        while source is not None:
            if source.name in self.table.ranges:
                return str(source.name)
            producer = source.producer()
            is_cast = producer is not None and producer.op_type == "Cast"
            source = producer.inputs[0] if producer is not None and is_cast else None
        raise InputError(
            f"calibration of {self.table.graph} has no range of {value.name}, which "
            f"{node.name} reads; calibrate again"
        )

    def _require_dtype(self, node: ir.Node, value: ir.Value) -> None:
        expected = ir.DataType.FLOAT16 if self.float_dtype == "float16" else ir.DataType.FLOAT
        if value.dtype is not None and value.dtype != expected:
            raise InputError(
                f"node {node.name} reads {value.name} as {value.dtype.name}; expected "
                f"{expected.name}; leave it out of the plan"
            )

    def _initializer(self, name: str, values: np.ndarray) -> ir.Value:
        tensor = ir.tensor(values, name=name)
        value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        self.graph.register_initializer(value)
        return value


def _describe(node: ir.Node, name: str, dtype: ir.DataType | None, shape: ir.Shape | None) -> None:
    output = node.outputs[0]
    output.name, output.shape = name, None if shape is None else shape.copy()
    output.type = None if dtype is None else ir.TensorType(dtype)
