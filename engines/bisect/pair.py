"""Two graphs of the same model, and the tensors that both have."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from tap_deploy.bundle.graph_files import load_graph
from tap_deploy.engines.fp16.rounding import HALF, round_to_half
from tap_deploy.engines.qdq.chosen_nodes import residual_nodes
from tap_deploy.errors import InputError, SessionError

MISSING = "not in both graphs"
CHOICE = "indices and conditions computed from rounded numbers"
RESCALED = "rescaled by SmoothQuant"

_SIZES = ("Shape", "Size")  # read a float tensor, but not its values


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GraphPair:
    """A graph to examine, and the graph it is compared with.

    Attributes:
        subject: the graph to examine; every fp16 value is rounded to fp16 on a CPU.
        reference: the graph to compare it with.
        layers: name of a tensor that both graphs compute -> node and operator that compute it in
            the subject, in the order of the subject.
        reads: name of any tensor of the subject -> names of the tensors that its node reads.
        milestones: names of residual sums and graph outputs.
        left_out: reason -> number of tensors of the reference that are not in ``layers``.
    """

    subject: ir.Model
    reference: ir.Model
    layers: dict[str, tuple[str, str]]
    reads: dict[str, tuple[str, ...]]
    milestones: frozenset[str]
    left_out: dict[str, int]

    def layers_before(self, tensor: str) -> set[str]:
        """Return the nearest tensors in ``layers`` that a tensor is computed from."""
        found, seen, open_names = set(), {tensor}, list(self.reads[tensor])
        while open_names:
            name = open_names.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in self.layers:
                found.add(name)
            else:
                open_names += self.reads.get(name, ())
        return found


def load_pair(
    subject: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    rescaled: Collection[str] = (),
) -> GraphPair:
    """Load two graphs and match their tensors by name.

    1. Conversions keep the names: an fp16 or int8 graph has the tensors of the fp32 graph, and
       those of additional Cast, QuantizeLinear and DequantizeLinear nodes, which are ignored.
    2. Outputs of ``rescaled`` nodes are not compared.
    3. Integers and booleans computed from floats are only compared if the subject computes in fp32
       without quantization. Otherwise two nearly tied scores may be chosen in another order.

    Args:
        subject: the ONNX file to examine.
        reference: the ONNX file to compare it with.
        rescaled: names of nodes whose output differs by design.

    Raises:
        BundleError: external weights are not in ``weights_file`` of a path.
        InputError: the graphs have no tensor in common.
        SessionError: an fp16 graph is not strongly typed.
    """
    models = [_load(path) for path in (subject, reference)]
    values, known = dict(_values(models[0])), dict(_values(models[1]))
    choices = _choices(models[0]) if _is_rounded(models[0]) else set()
    skipped = {name for name, value in values.items() if _producer(value).name in rescaled}
    common = [name for name in values if name in known]
    layers = {n: _layer(values[n]) for n in common if n not in choices and n not in skipped}
    if not layers:
        raise InputError(
            f"{subject} and {reference} have no tensor of the same name; expected two graphs of "
            "one model, exported by the same versions of torch and onnxscript"
        )
    pair = GraphPair(
        subject=models[0],
        reference=models[1],
        layers=layers,
        reads={
            name: tuple(str(read.name) for read in _producer(value).inputs if read is not None)
            for name, value in values.items()
        },
        milestones=_milestones(models[1]),
        left_out={
            MISSING: len(known) - len(common),
            CHOICE: len(choices.intersection(common)),
            RESCALED: len(skipped.intersection(common)),
        },
    )
    try:
        round_to_half(pair.subject)
    except ValueError as exc:
        raise SessionError(f"graph {subject}: {exc}") from exc
    return pair


def _load(path: str | os.PathLike[str]) -> ir.Model:
    """Load a graph; infer the dtypes of its tensors, which pieces need, if the file lacks some."""
    model = load_graph(path)
    if any(value.dtype is None for _, value in _values(model)):
        ShapeInferencePass()(model)
    return model


def _values(model: ir.Model) -> Iterator[tuple[str, ir.Value]]:
    return ((str(value.name), value) for node in model.graph for value in node.outputs)


def _layer(value: ir.Value) -> tuple[str, str]:
    """Return name and operator of the node that computes a value, looking through Casts.

    The fp16 conversion inserts a Cast before an output of the graph that is fp32.
    """
    node = _producer(value)
    source = node.inputs[0] if node.op_type == "Cast" else None
    if source is not None and str(source.name).startswith(f"{value.name}/"):
        node = source.producer() or node
    return str(node.name), node.op_type


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None  # an output of a node
    return node


def _is_rounded(model: ir.Model) -> bool:
    """Whether a graph has fp16 or quantized tensors."""
    return any(
        node.op_type == "QuantizeLinear" or any(value.dtype == HALF for value in node.outputs)
        for node in model.graph
    )


def _choices(model: ir.Model) -> set[str]:
    """Return the integer and boolean tensors that depend on the values of float tensors."""
    found: set[str] = set()
    for node in model.graph:
        depends = node.op_type not in _SIZES and any(
            value is not None
            and not value.is_initializer()
            and (_is_float(value) or value.name in found)
            for value in node.inputs
        )
        found |= {str(v.name) for v in node.outputs if depends and not _is_float(v)}
    return found


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _milestones(model: ir.Model) -> frozenset[str]:
    sums = set(residual_nodes(model))
    names = {str(node.outputs[0].name) for node in model.graph if node.name in sums}
    return frozenset(names | {str(value.name) for value in model.graph.outputs})
