"""Conversion of an fp32 graph to a strongly typed fp16 graph, where only Casts change dtypes."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from tap_deploy.engines.fp16.islands import is_float
from tap_deploy.errors import InputError
from tap_deploy.graphs import GraphSpec

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
_SUFFIXES = {HALF: "fp16", SINGLE: "fp32"}
# An attribute determines the output dtype of these operators; this pass does not rewrite it.
_UNTYPED = {"Bernoulli", "ConstantOfShape", "EyeLike", "RandomNormal", "RandomUniform"}


def half_from_single(model: ir.Model, spec: GraphSpec, islands: Collection[str]) -> None:
    """Convert an fp32 graph to a typed fp16 graph, in place.

    1. Nodes in ``islands`` compute in fp32, all others in fp16: all float inputs and outputs of a
       node have that dtype.
    2. Inputs and outputs of the graph have the dtypes of ``spec``.
    3. If nodes read a value in the other dtype, they share one Cast after its producer. An island
       of several nodes has Casts only at its border.
    4. Weights have the dtype of the nodes that read them; a weight with readers of both dtypes is
       stored twice.

    Args:
        model: an fp32 graph without subgraphs and functions.
        spec: inputs and outputs of the fp16 graph.
        islands: names of the fp32 nodes.

    Raises:
        InputError: the graph has an operator that this pass does not support.
    """
    types = _types_of_values(model.graph, spec, islands)
    caster = _Caster(model.graph, types)
    for node in list(model.graph):
        wanted = SINGLE if node.name in islands else HALF
        for index, value in enumerate(node.inputs):
            if value is not None and value in types:
                node.replace_input_with(index, caster.cast(value, wanted))
        if node.op_type == "Cast" and node.outputs[0] in types:
            node.attributes["to"] = ir.AttrInt64("to", wanted.value)
    for index, (value, tensor) in enumerate(zip(model.graph.outputs, spec.outputs, strict=True)):
        if value in types:
            model.graph.outputs[index] = caster.cast_output(value, _data_type(tensor.dtype))
    for value, dtype in types.items():
        value.dtype = dtype


def _types_of_values(
    graph: ir.Graph, spec: GraphSpec, islands: Collection[str]
) -> dict[ir.Value, ir.DataType]:
    """Return the dtype of every float value, and convert weights that only fp16 nodes read."""
    types: dict[ir.Value, ir.DataType] = {}
    for value, tensor in zip(graph.inputs, spec.inputs, strict=True):
        if is_float(value):
            types[value] = _data_type(tensor.dtype)
    for value in graph.initializers.values():
        if not is_float(value):
            continue
        types[value] = SINGLE if _is_read_in_fp32(value, islands) else HALF
        if types[value] == HALF:
            value.const_value = _half_tensor(value)
            value.dtype = HALF
    for node in graph:
        if node.op_type in _UNTYPED and is_float(node.outputs[0]):
            raise InputError(
                f"node {node.name} is a {node.op_type}, which fp16 conversion does not support; "
                "export the bundle again with this release"
            )
        for value in node.outputs:
            if is_float(value):
                types[value] = SINGLE if node.name in islands else HALF
    return types


def _is_read_in_fp32(value: ir.Value, islands: Collection[str]) -> bool:
    return any(node.name in islands for node in value.consumers())


class _Caster:
    """Returns values in the other dtype, creating each Cast only once."""

    def __init__(self, graph: ir.Graph, types: dict[ir.Value, ir.DataType]) -> None:
        self._graph, self._types = graph, types
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._first = next(iter(graph), None)

    def cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """Return ``value`` in a dtype."""
        if self._types[value] == wanted:
            return value
        key = (value, wanted)
        if key not in self._made:
            is_weight = value.is_initializer()
            self._made[key] = self._add_weight(value) if is_weight else self._add(value, wanted)
        return self._made[key]

    def cast_output(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """Return a graph output in a dtype, under its original name."""
        if self._types[value] == wanted:
            return value
        name, value.name = value.name, f"{value.name}/{_SUFFIXES[self._types[value]]}"
        made = self._made.pop((value, wanted), None) or self._add(value, wanted)
        made.name = name
        return made

    def _add(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        name = f"{value.name}/{_SUFFIXES[wanted]}"
        node = ir.node("Cast", [value], {"to": wanted.value}, name=f"{name}/Cast")
        node.outputs[0].name, node.outputs[0].dtype = name, wanted
        node.outputs[0].shape = value.shape
        producer = value.producer()
        if producer is not None:
            self._graph.insert_after(producer, [node])
        elif self._first is not None:
            self._graph.insert_before(self._first, [node])
        return node.outputs[0]

    def _add_weight(self, value: ir.Value) -> ir.Value:
        """Return an fp16 copy of a weight that islands also read."""
        twin = ir.Value(
            name=f"{value.name}/{_SUFFIXES[HALF]}",
            type=ir.TensorType(HALF),
            shape=value.shape,
            const_value=_half_tensor(value),
        )
        self._graph.register_initializer(twin)
        return twin


def _half_tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    with np.errstate(over="ignore"):  # only islands read weights that overflow
        array = value.const_value.numpy().astype(np.float16)
    return ir.tensor(array, name=value.name)


def _data_type(name: str) -> ir.DataType:
    return ir.DataType.from_numpy(np.dtype(name))
