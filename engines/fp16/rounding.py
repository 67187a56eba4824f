"""A typed fp16 graph on onnxruntime's CPU provider, rounded as a GPU would do it.

By itself that provider computes fp16 nodes in fp32 and drops its Casts between them, so that a
product beyond 65504 comes out finite. Casts that stand in the graph itself it respects.
"""

from __future__ import annotations

import os
import pathlib
import tempfile

import onnx_ir as ir

from tap_deploy.bundle.graph_files import load_graph, write_model
from tap_deploy.errors import SessionError
from tap_deploy.graphs import GraphSpec
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.opening import create_session

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT


def load_rounding(
    path: str | os.PathLike[str], spec: GraphSpec, *, threads: int | None = None
) -> Session:
    """Load a typed fp16 graph for the CPU so that every value it has in fp16 is rounded to fp16.

    Args:
        path: the ONNX file.
        spec: what it takes and gives.
        threads: CPU threads; None for one per core.

    Raises:
        BundleError: the graph has weights in a file that is not its own.
        InputError: ``threads`` is out of range.
        SessionError: a node mixes fp16 and fp32, the dtype of a value is not in the file, or
            onnxruntime does not load the graph.
        MissingDependencyError: onnxruntime is not installed.
    """
    model = load_graph(path)
    try:
        round_to_half(model)
    except ValueError as exc:
        raise SessionError(f"graph {spec.name}: {exc}") from exc
    with tempfile.TemporaryDirectory(prefix="tap-rounding-") as folder:
        file = pathlib.Path(folder) / "rounding.onnx"
        write_model(model, file, beside=True)  # mapped, not parsed
        return create_session("onnxruntime", file, spec, threads=threads)


def round_to_half(model: ir.Model) -> None:
    """Let nodes compute in fp32 what they have in fp16, and round their results, in place.

    Sums of products are then accumulated in fp32 and rounded once. Each result goes through
    a Cast to fp16, which keeps its name, and a Cast back for the nodes that read it. Inputs,
    weights, outputs of a graph and what control flow hands on remain fp16.

    Raises:
        ValueError: a node mixes fp16 and fp32, which strongly typed builders refuse, or the
            dtype of a value is not in the file.
    """
    for node in [node for node in model.graph.all_nodes() if _computes_in_half(node)]:
        for value in node.outputs:
            if value.dtype is None and value.uses():  # it would not be rounded, and nobody told
                raise ValueError(f"output {value.name} of node {node.name} has no dtype")
            if value.dtype == HALF:
                _store_in_half(value)
    for graph in model.graphs():
        made = [value for node in graph for value in node.outputs]
        for value in (*graph.inputs, *graph.initializers.values(), *made):
            if value.dtype == HALF:
                _read_in_single(value, graph)


def _computes_in_half(node: ir.Node) -> bool:
    """Whether a node has fp16 from its inputs: Casts and constants have it from an attribute."""
    dtypes = {value.dtype for value in node.inputs if value is not None}
    if not _is_plain(node) or HALF not in dtypes:
        return False
    if SINGLE in dtypes:
        raise ValueError(f"node {node.name} mixes float16 and float32; expected one of them")
    return True


def _is_plain(node: ir.Node) -> bool:
    """Whether a node is neither a Cast, which names its dtype, nor control flow."""
    return node.op_type != "Cast" and not any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for attribute in node.attributes.values()
    )


def _store_in_half(value: ir.Value) -> None:
    """Give the name and the readers of a result to its copy in fp16; it is fp32 now."""
    cast, name = _cast(value, HALF), value.name
    value.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
    cast.replace_input_with(0, value)
    value.name, value.dtype, cast.outputs[0].name = f"{name}/exact", SINGLE, name
    producer = value.producer()
    assert producer is not None and producer.graph is not None
    producer.graph.insert_after(producer, [cast])


def _read_in_single(value: ir.Value, graph: ir.Graph) -> None:
    """Put a Cast to fp32 between an fp16 value and the nodes that compute with it."""
    uses = [use for use in value.uses() if _is_plain(use.node)]
    if not uses:
        return
    cast, producer = _cast(value, SINGLE), value.producer()
    cast.outputs[0].name = f"{value.name}/single"
    if producer is None:
        graph.insert_before(next(iter(graph)), [cast])
    else:
        graph.insert_after(producer, [cast])
    for node, index in uses:
        node.replace_input_with(index, cast.outputs[0])


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype.value})
    node.outputs[0].dtype, node.outputs[0].shape = dtype, value.shape
    return node
