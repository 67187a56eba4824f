"""Creation of Q/DQ nodes and their constants, one tensor at a time."""

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

LEVELS = 127  # symmetric int8, without -128
# CPUs without VNNI add pairs of products in 16 bits. With weights up to 64, a pair of products with
# uint8 fits, so that onnxruntime's fast kernel is exact.
REDUCED_LEVELS = 64
# Smallest normal numbers; hardware may flush subnormal scales to zero.
SMALLEST_SCALES = {"float16": 6.2e-5, "float32": 1.2e-38}


ZERO_POINT = "zero_point.int8"


class QdqWriter:
    """Adds Q/DQ to a graph, in place.

    Scales have the dtype of the tensor if the graph states it, or else ``float_dtype``. With
    ``shared``, all consumers of a tensor share one Q and one DQ. Otherwise each has its own,
    because onnxruntime does not run a node in int8 if its Q has other consumers. As onnxruntime
    merges identical nodes, each pair gets a different ``axis``, which has no effect with a single
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
        """Insert Q/DQ at the activation inputs of a node, and quantize its weight.

        Raises:
            InputError: a tensor has no range.
        """
        weight = node.inputs[1] if has_constant_weight(node) else None
        for position, value in activation_inputs(node):
            if _is_dequantized(value):  # output of a convolution, already quantized
                continue
            node.replace_input_with(position, self._activation(node, value))
        if weight is not None:
            node.replace_input_with(1, self._weight(node, weight))

    def quantize_output(self, node: ir.Node) -> None:
        """Insert Q/DQ after a node, for all its consumers.

        Raises:
            InputError: the output has no range.
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
        """Insert a Q and a DQ directly after a value, and return the dequantized value."""
        name, made = str(value.name), self._pairs.setdefault(value, [])
        rank = 1 if value.shape is None else len(value.shape)
        attributes = {} if self.shared else {"axis": len(made) % max(1, rank)}
        constants = [self._scale(node, value), self._zero]
        q = ir.node("QuantizeLinear", [value, *constants], attributes)
        dq = ir.node("DequantizeLinear", [q.outputs[0], *constants], attributes)
        # NameFixPass makes repeated names unique.
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
        # A weight used with two channel axes, which does not occur in our graphs, needs two names.
        name = f"{weight.name}.axis{axis}" if self._seen(weight) else str(weight.name)
        return (
            self._initializer(f"{name}.int8", values),
            self._initializer(f"{name}.scale", scales),
            self._initializer(f"{name}.zero_point", np.zeros(scales.shape, np.int8)),
        )

    def _seen(self, weight: ir.Value) -> bool:
        return any(value is weight for value, _ in self._weights)

    def _calibrated_name(self, node: ir.Node, value: ir.Value) -> str:
        """Return the name of the tensor in the fp32 graph.

        A typed fp16 graph has additional Casts, whose outputs are named ``name/fp16``.
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
                f"tensor {value.name} is {value.dtype.name}; expected FLOAT or FLOAT16; remove the "
                "nodes that read it from the selection"
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
    """Return the int8 scales for ranges, in the float dtype of the graph.

    A scale is at least the smallest normal number of the dtype, also for a tensor of zeros.
    Rounding to float16 may reduce a scale by a factor of 1/2000, which clips the largest value by
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
    """Return the int8 weight, in the same shape, and the scales per output channel [channels].

    The weight is divided by the scales after their rounding to ``float_dtype``, as in the graph.

    Args:
        weight: float, any shape.
        channel_axis: output channel axis.
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
