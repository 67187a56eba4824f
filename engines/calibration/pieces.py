"""A graph cut into pieces that run one after the other, so that few tensors are alive at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import onnx_ir as ir

from tap_deploy.errors import InputError

BYTES_PER_FLOAT = 4
# Of a tensor whose shape says too little, and it is one of few.
UNKNOWN_AXIS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece: the model, what it needs from pieces before it, what it hands on and shows."""

    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]  # what later pieces need, and graph outputs
    taps: tuple[str, ...]  # what is to be looked at; some are outputs as well


def segments_from_model(
    model: ir.Model,
    taps: Collection[str],
    *,
    sizes: Mapping[str, int],
    limit_bytes: int,
) -> Iterator[Segment]:
    """Cut a graph so that the tensors to be looked at, of each piece, stay below a bound.

    A piece is made when it is asked for. Its weights are those of the model, not copies.

    Running the whole graph with every tensor as an output would keep all of them alive (2.8 GB
    for the encoder of ``tap_vit_l``), and running it once per group of tensors would repeat the
    work. Pieces do neither.

    Args:
        model: nodes in topological order.
        taps: names of tensors to look at; graph inputs among them are left out.
        sizes: axis name -> size to expect, for the bound.
        limit_bytes: of the taps of a piece; a single larger tensor is let through.

    Raises:
        InputError: the graph makes no such tensor.
    """
    made = {v.name: position for position, n in enumerate(model.graph) for v in n.outputs}
    inputs = {value.name for value in model.graph.inputs}
    unknown = sorted(name for name in taps if name not in made and name not in inputs)
    if unknown:
        raise InputError(f"graph {model.graph.name} has no tensor {unknown[0]!r} to calibrate")
    nodes = list(model.graph)
    groups = _groups(nodes, {name for name in taps if name in made}, sizes, limit_bytes)
    return (
        _segment(model, nodes[start:stop], nodes[stop:], group)
        for (start, stop), group in zip(_bounds(groups, len(nodes)), groups, strict=True)
    )


_Group = list[tuple[int, str]]  # position of the node that makes a tensor, and its name


def _groups(
    nodes: Sequence[ir.Node], taps: set[str], sizes: Mapping[str, int], limit_bytes: int
) -> list[_Group]:
    groups: list[_Group] = [[]]
    used = 0
    for position, node in enumerate(nodes):
        for value in node.outputs:
            if value.name not in taps:
                continue
            size = BYTES_PER_FLOAT * num_values(value, sizes)
            if groups[-1] and used + size > limit_bytes:
                groups.append([])
                used = 0
            groups[-1].append((position, str(value.name)))
            used += size
    return groups


def _bounds(groups: Sequence[_Group], num_nodes: int) -> list[tuple[int, int]]:
    """A piece ends after the node that makes its last tensor; the last one ends the graph."""
    stops = [group[-1][0] + 1 for group in groups[:-1]] + [num_nodes]
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _segment(
    model: ir.Model, nodes: Sequence[ir.Node], later: Sequence[ir.Node], group: _Group
) -> Segment:
    made = {v.name: v for node in nodes for v in node.outputs}
    wanted = {v.name for node in later for v in node.inputs if v is not None}
    wanted |= {value.name for value in model.graph.outputs}
    needed = {
        str(v.name): v
        for node in nodes
        for v in node.inputs
        if v is not None and v.name not in made and not v.is_initializer()
    }
    outputs = [str(name) for name in made if name in wanted]
    taps = [name for _, name in group]
    shown = [*outputs, *(name for name in taps if name not in outputs)]
    graph = ir.convenience.extract(model.graph, list(needed), shown)
    graph.name = model.graph.name
    piece = ir.Model(graph, ir_version=int(model.ir_version or 10))
    return Segment(model=piece, inputs=tuple(needed), outputs=tuple(outputs), taps=tuple(taps))


def num_values(value: ir.Value, sizes: Mapping[str, int]) -> int:
    """Return how many values a tensor holds once its dynamic axes have the given sizes."""
    if value.shape is None:
        return UNKNOWN_AXIS**2
    return math.prod(_axis(dim, sizes) for dim in value.shape)


def _axis(dim: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    try:
        size = dim.evaluate(dict(sizes))
    except (KeyError, TypeError, ValueError):
        return UNKNOWN_AXIS
    return size if isinstance(size, int) else UNKNOWN_AXIS
