"""Emulation of fp16 rounding on onnxruntime's CPU provider.

That provider computes fp16 nodes in fp32 and removes the Casts that it inserts between them, so a
product beyond 65504 stays finite. It keeps Casts that are part of the graph.
"""

from __future__ import annotations

import os

import onnx_ir as ir

from tap_deploy.bundle.graph_files import load_graph, write_model
from tap_deploy.errors import SessionError
from tap_deploy.graphs import GraphSpec
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.opening import create_session
from tap_deploy.storage.unfinished import temporary_folder

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT


def load_rounding(
    path: str | os.PathLike[str], spec: GraphSpec, *, threads: int | None = None
) -> Session:
    """Load a typed fp16 graph on the CPU, with every fp16 value rounded to fp16.

    Args:
        path: the ONNX file.
        spec: its inputs and outputs.
        threads: CPU threads; None for one per core.

    Raises:
        BundleError: external weights are not in ``weights_file(path)``.
        InputError: ``threads`` is out of range.
        SessionError: a node mixes fp16 and fp32, a value has no dtype in the file, or onnxruntime
            cannot load the graph.
        MissingDependencyError: onnxruntime is not installed.
    """
    model = load_graph(path)
    try:
        round_to_half(model)
    except ValueError as exc:
        raise SessionError(f"graph {spec.name}: {exc}") from exc
    with temporary_folder() as folder:
        file = folder / "rounding.onnx"
        try:
            write_model(model, file, beside=True)  # external weights are mapped instead of parsed
        except OSError as exc:
            raise SessionError(
                f"graph {spec.name}: cannot write a temporary copy of its weights to {folder}: "
                f"{exc}; set TMPDIR to a folder with enough space"
            ) from exc
        return create_session("onnxruntime", file, spec, threads=threads)


def round_to_half(model: ir.Model) -> None:
    """Make fp16 nodes compute in fp32 and round their results to fp16, in place.

    Sums of products are accumulated in fp32 and rounded once. Each result goes through a Cast to
    fp16, which keeps its name, and a Cast back to fp32 for the nodes that read it. Inputs, weights
    and outputs of graphs, and values passed by control flow, stay fp16.

    Raises:
        ValueError: a node mixes fp16 and fp32, which strongly typed builders refuse, or a value has
            no dtype in the file.
    """
    for node in [node for node in model.graph.all_nodes() if _computes_in_half(node)]:
        for value in node.outputs:
            if value.dtype is None and value.uses():  # it would silently not be rounded
                raise ValueError(f"output {value.name} of node {node.name} has no dtype")
            if value.dtype == HALF:
                _store_in_half(value)
    for graph in model.graphs():
        made = [value for node in graph for value in node.outputs]
        for value in (*graph.inputs, *graph.initializers.values(), *made):
            if value.dtype == HALF:
                _read_in_single(value, graph)


def _computes_in_half(node: ir.Node) -> bool:
    """Whether a node has fp16 inputs and computes; Casts and control flow do not count.

    Raises:
        ValueError: it mixes fp16 and fp32.
    """
    dtypes = {value.dtype for value in node.inputs if value is not None}
    if not _is_plain(node) or HALF not in dtypes:
        return False
    if SINGLE in dtypes:
        raise ValueError(f"node {node.name} mixes float16 and float32; expected one of them")
    return True


def _is_plain(node: ir.Node) -> bool:
    """Whether a node is neither a Cast, which has a fixed output dtype, nor control flow."""
    return node.op_type != "Cast" and not any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for attribute in node.attributes.values()
    )


def _store_in_half(value: ir.Value) -> None:
    """Turn a result into fp32, and give its name and its readers to an fp16 copy of it."""
    cast, name = _cast(value, HALF), value.name
    value.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
    cast.replace_input_with(0, value)
    value.name, value.dtype, cast.outputs[0].name = f"{name}/exact", SINGLE, name
    producer = value.producer()
    assert producer is not None and producer.graph is not None
    producer.graph.insert_after(producer, [cast])


def _read_in_single(value: ir.Value, graph: ir.Graph) -> None:
    """Insert a Cast to fp32 between an fp16 value and the nodes that compute with it."""
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
