"""Cleans up an exported graph: axis names, readable node names, no unused parts."""

from __future__ import annotations

import re

import onnx_ir as ir
from onnx_ir.passes import common as passes

from tap_deploy.graphs import GraphSpec

SCOPES = "pkg.torch.onnx.name_scopes"


def clean_up(model: ir.Model, spec: GraphSpec) -> None:
    """Clean up a graph in place.

    1. Name dynamic axes as in the spec, in place of the exporter's symbols.
    2. Name nodes after their module (``blocks.3.mlp.fc1/MatMul``), so that reports and exclusion
       lists can refer to blocks.
    3. Remove identities, unused nodes and initializers, and repeated subexpressions.
    4. Remove metadata, which contains stack traces with paths of the exporting machine.
    """
    rename_axes(model, spec)
    rename_nodes(model)
    tidy = ir.passes.Sequential(
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.DeduplicateInitializersPass(),
        passes.RemoveUnusedNodesPass(),
        passes.ClearMetadataAndDocStringPass(),
        passes.TopologicalSortPass(),
        passes.NameFixPass(),
    )
    tidy(model)
    model.graph.name = spec.name


def rename_axes(model: ir.Model, spec: GraphSpec) -> None:
    """Replace the exporter's symbols (``s34``, ``16*s34``) by the axis names of the spec."""
    names: dict[str, str] = {}
    for tensor, value in zip(spec.inputs, model.graph.inputs, strict=True):
        if value.shape is None:
            continue
        for position, axis in tensor.dynamic_axes.items():
            symbol = value.shape[position]
            if isinstance(symbol, ir.SymbolicDim) and symbol.value is not None:
                names[str(symbol.value)] = axis
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    if dim.value is None:
        return None
    return re.sub(r"\bs\d+\b", lambda match: names.get(match[0], match[0]), str(dim.value))


def rename_nodes(model: ir.Model) -> None:
    """Name every node ``module.path/Op``, and the weights of a Linear after its module.

    The exporter stores the transposed weights of a Linear as a new constant, which is renamed to
    ``module.path.weight.T``. NameFixPass makes repeated names unique.
    """
    for node in model.graph:
        path = _module_path(node)
        node.name = f"{path}/{node.op_type}" if path else node.op_type
        for value in node.inputs:
            if value is None or not value.is_initializer() or not _is_numbered(value):
                continue
            if node.op_type == "MatMul" and value is node.inputs[1]:
                value.name = f"{path}.weight.T"


def _is_numbered(value: ir.Value) -> bool:
    return re.fullmatch(r"val_\d+", value.name or "") is not None


def _module_path(node: ir.Node) -> str:
    """Return the path of the module of a node, else that of the node's first named producer."""
    parts = re.findall(r"'([^']*)'", node.metadata_props.get(SCOPES, ""))
    if len(parts) > 1:
        return str(parts[-2])
    for value in node.inputs:
        producer = None if value is None else value.producer()
        if producer is not None and producer.name and "/" in producer.name:
            return str(producer.name.rsplit("/", 1)[0])
    return ""
