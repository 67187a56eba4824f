"""The nodes and constants of Q/DQ, one tensor at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from tap_deploy.engines.calibration.table import CalibrationTable
from tap_deploy.engines.qdq.chosen_nodes import (
    activation_inputs,
    has_constant_weight,
    weight_channel_axis,
)
from tap_deploy.errors import InputError

LEVELS = 127  # int8 without -128: the same steps on both sides of zero
# Two products of a weight up to 64 and a uint8 fit into 16 bits, which is where CPUs without VNNI
# add them up; onnxruntime takes its quick kernel for such weights, and is exact.
REDUCED_LEVELS = 64
# A smaller scale is no normal number in the dtype, and hardware may take it for zero.
SMALLEST_SCALES = {"float16": 6.2e-5, "float32": 1.2e-38}


ZERO_POINT = "zero_point.int8"


class QdqWriter:
    """Adds Q/DQ to a graph, in place.

    Scales have the dtype of the tensor where the graph says it, else ``float_dtype``.
    ``shared`` gives a tensor one Q and one DQ for all its readers. Without, every reader gets its
    own: onnxruntime computes nothing in int8 that reads a Q together with others. It merges nodes
    that are the same, so each pair has another ``axis``, which means nothing where there is one
    scale.
    """

    def __init__(
        self,
        graph: ir.Graph,
        table: CalibrationTable,
        float_dtype: str,
        *,
        shared: bool,
        weight_levels: int = LEVELS,
    ) -> None:
        self.graph, self.table, self.float_dtype = graph, table, float_dtype
        self.shared, self.weight_levels = shared, weight_levels
        self._pairs: dict[ir.Value, list[ir.Value]] = {}
        self._scales: dict[ir.Value, ir.Value] = {}
        self._weights: dict[tuple[ir.Value, int], tuple[ir.Value, ir.Value, ir.Value]] = {}
        self._zero = self._initializer(ZERO_POINT, np.zeros((), np.int8))

    def quantize_inputs(self, node: ir.Node) -> None:
        """Put Q/DQ at the activations that a node reads, and make its weight int8.

        Raises:
            InputError: a tensor has no range.
        """
        weight = node.inputs[1] if has_constant_weight(node) else None
        for position, value in activation_inputs(node):
            if _is_dequantized(value):  # what a convolution made, as int8 already
                continue
            node.replace_input_with(position, self._activation(node, value))
        if weight is not None:
            node.replace_input_with(1, self._weight(node, weight))

    def quantize_output(self, node: ir.Node) -> None:
        """Put Q/DQ behind a node, for all that read it.

        Raises:
            InputError: its output has no range.
        """
        value = node.outputs[0]
        readers = [use for use in value.uses() if use.node.op_type != "QuantizeLinear"]
        rounded = self._pair(node, value)
        for reader, position in readers:
            reader.replace_input_with(position, rounded)

    def _activation(self, node: ir.Node, value: ir.Value) -> ir.Value:
        if self.shared and value in self._pairs:
            return self._pairs[value][0]
        return self._pair(node, value)

    def _pair(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """Add a Q and a DQ right behind a value, and return what comes out."""
        name, made = str(value.name), self._pairs.setdefault(value, [])
        rank = 1 if value.shape is None else len(value.shape)
        attributes = {} if self.shared else {"axis": len(made) % max(1, rank)}
        constants = [self._scale(node, value), self._zero]
        q = ir.node("QuantizeLinear", [value, *constants], attributes)
        dq = ir.node("DequantizeLinear", [q.outputs[0], *constants], attributes)
        # NameFixPass numbers names that repeat.
        q.name, dq.name = f"{name}/QuantizeLinear", f"{name}/DequantizeLinear"
        _describe(q, f"{name}.int8", ir.DataType.INT8, value.shape)
        _describe(dq, f"{name}.dequantized", value.dtype, value.shape)
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], [q, dq])
        else:
            self.graph.insert_after(producer, [q, dq])
        made.append(dq.outputs[0])
        return dq.outputs[0]

    def _scale(self, node: ir.Node, value: ir.Value) -> ir.Value:
        if value not in self._scales:
            amax = self.table.ranges[self._calibrated_name(node, value)]
            scale = scales_from_amax(amax, self._float_dtype(value))
            self._scales[value] = self._initializer(f"{value.name}.scale", scale)
        return self._scales[value]

    def _weight(self, node: ir.Node, weight: ir.Value) -> ir.Value:
        axis = weight_channel_axis(node)
        if (weight, axis) not in self._weights:
            self._weights[weight, axis] = self._weight_constants(weight, axis)
        inputs = self._weights[weight, axis]
        dq = ir.node("DequantizeLinear", inputs, {"axis": axis})
        dq.name = f"{weight.name}/DequantizeLinear"
        _describe(dq, f"{weight.name}.dequantized", weight.dtype, weight.shape)
        self.graph.insert_before(node, dq)
        return dq.outputs[0]

    def _weight_constants(self, weight: ir.Value, axis: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        if weight.const_value is None:
            raise InputError(f"weight {weight.name} has no values; export the graph again")
        values, scales = quantized_weight(
            weight.const_value.numpy(), axis, self._float_dtype(weight), self.weight_levels
        )
        # A weight that is read along two axes, which no graph of ours has, gets two names.
        name = f"{weight.name}.axis{axis}" if self._seen(weight) else str(weight.name)
        return (
            self._initializer(f"{name}.int8", values),
            self._initializer(f"{name}.scale", scales),
            self._initializer(f"{name}.zero_point", np.zeros(scales.shape, np.int8)),
        )

    def _seen(self, weight: ir.Value) -> bool:
        return any(value is weight for value, _ in self._weights)

    def _calibrated_name(self, node: ir.Node, value: ir.Value) -> str:
        """Name of the tensor in the fp32 graph.

        A typed fp16 graph has Casts in between, and calls what they make ``name/fp16``.
        """
        source: ir.Value | None = value
        while source is not None:
            for name in (str(source.name), str(source.name).rpartition("/fp")[0]):
                if name in self.table.ranges:
                    return name
            producer = source.producer()
            is_cast = producer is not None and producer.op_type == "Cast"
            source = producer.inputs[0] if producer is not None and is_cast else None
        raise InputError(
            f"calibration of {self.table.graph} has no range of {value.name}, needed by "
            f"{node.name}; calibrate again"
        )

    def _float_dtype(self, value: ir.Value) -> str:
        known = {ir.DataType.FLOAT16: "float16", ir.DataType.FLOAT: "float32"}
        if value.dtype is None:
            return self.float_dtype
        if value.dtype not in known:
            raise InputError(
                f"tensor {value.name} is {value.dtype.name}; expected FLOAT or FLOAT16; leave the "
                "nodes that read it out of the plan"
            )
        return known[value.dtype]

    def _initializer(self, name: str, values: np.ndarray) -> ir.Value:
        tensor = ir.tensor(values, name=name)
        value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        self.graph.register_initializer(value)
        return value


def _is_dequantized(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _describe(node: ir.Node, name: str, dtype: ir.DataType | None, shape: ir.Shape | None) -> None:
    output = node.outputs[0]
    output.name, output.shape = name, None if shape is None else shape.copy()
    output.type = None if dtype is None else ir.TensorType(dtype)


def scales_from_amax(
    amax: npt.ArrayLike, float_dtype: str, levels: int = LEVELS
) -> npt.NDArray[Any]:
    """Return the step of int8 for a range, in the dtype that the graph computes with.

    A step is never below the smallest normal number of the dtype, nor 0 where all values are 0.
    Rounding to float16 may make it smaller by a 2000th, so that the largest value is clipped by
    as much.

    Args:
        amax: largest magnitudes, any shape.
        float_dtype: ``float16`` or ``float32``.
        levels: steps on each side of zero.
    """
    scales = np.maximum(np.asarray(amax, np.float64) / levels, SMALLEST_SCALES[float_dtype])
    return scales.astype(float_dtype)


def quantized_weight(
    weight: npt.NDArray[np.floating[Any]],
    channel_axis: int,
    float_dtype: str,
    levels: int = LEVELS,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[Any]]:
    """Return a weight as int8, same shape, and the scales of its output channels [channels].

    The values are divided by the scales as the graph will have them, rounded to its dtype.

    Args:
        weight: float, any shape.
        channel_axis: axis of the output channels.
        float_dtype: ``float16`` or ``float32``.
        levels: steps on each side of zero, 127 at most.
    """
    values = weight.astype(np.float32)
    others = tuple(axis for axis in range(values.ndim) if axis != channel_axis)
    scales = scales_from_amax(np.abs(values).max(axis=others), float_dtype, levels)
    shape = [1] * values.ndim
    shape[channel_axis] = -1
    steps = values / scales.astype(np.float32).reshape(shape)
    return np.clip(np.rint(steps), -levels, levels).astype(np.int8), scales
