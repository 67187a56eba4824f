"""Execution of a graph in consecutive pieces, to limit the memory of tapped tensors."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from tap_deploy.bundle.graph_files import write_model
from tap_deploy.errors import InputError, SessionError, first_line
from tap_deploy.sessions.ort.session import import_onnxruntime, session_options
from tap_deploy.storage.unfinished import temporary_folder

OnTap = Callable[[str, np.ndarray], None]


BYTES_PER_FLOAT = 4
# Assumed size of an axis that the shape does not tell; only a few tensors have such axes.
UNKNOWN_AXIS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a graph.

    Attributes:
        model: the piece as a model.
        inputs: names of its inputs.
        outputs: names of tensors that later pieces need, and of graph outputs.
        taps: names of tapped tensors; some are also outputs.
    """

    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    taps: tuple[str, ...]


def segments_from_model(
    model: ir.Model,
    taps: Collection[str],
    *,
    sizes: Mapping[str, int],
    limit_bytes: int,
) -> Iterator[Segment]:
    """Yield consecutive pieces of a graph whose tapped tensors stay within a memory limit.

    Pieces are created lazily and share the weights of the model.

    Running the whole graph with every tapped tensor as an output would keep all of them alive
    (2.8 GB for the encoder of ``tap_vit_l``), and running it once per group of tensors would repeat
    the work.

    Args:
        model: model with nodes in topological order.
        taps: names of tensors to tap; graph inputs among them are ignored.
        sizes: axis name -> expected size, to compute the memory.
        limit_bytes: limit on the taps of a piece, bytes; a single tensor may exceed it.

    Raises:
        InputError: the graph does not have a tensor.
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


_Group = list[tuple[int, str]]  # (index of the node that produces a tensor, name of the tensor)


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
    """Return the node range of each group, which ends after the node of its last tensor."""
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
    """Return the number of elements of a tensor for given sizes of the dynamic axes."""
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


class SegmentedRun:
    """Runs the pieces of a graph on onnxruntime's CPU provider."""

    def __init__(self, segments: Iterable[Segment], *, threads: int | None = None) -> None:
        self._pieces = []
        for segment in segments:
            self._pieces.append(_Piece(segment, threads))
            # Free the model of the piece now, as its session has the weights. Nodes and values
            # reference each other, so only the garbage collector can free them.
            del segment
            gc.collect()
        last_use = {name: i for i, piece in enumerate(self._pieces) for name in piece.inputs}
        self._last_use = last_use

    def run(self, inputs: Mapping[str, np.ndarray], on_tap: OnTap) -> dict[str, np.ndarray]:
        """Run all pieces, report every tapped tensor, and free tensors after their last use.

        Args:
            inputs: inputs of the whole graph, by name.
            on_tap: called with name and values of each tapped tensor.

        Returns:
            The outputs of the graph, by name.

        Raises:
            SessionError: onnxruntime failed.
        """
        alive = dict(inputs)
        results: dict[str, np.ndarray] = {}
        for index, piece in enumerate(self._pieces):
            found = piece.run(alive)
            for name in piece.taps:
                on_tap(name, found[name])
            kept = {name: found[name] for name in piece.outputs}
            results |= kept
            alive |= kept
            alive = {n: value for n, value in alive.items() if self._last_use.get(n, -1) > index}
            results = {
                n: value for n, value in results.items() if n in alive or n not in self._last_use
            }
        return results


class _Piece:
    def __init__(self, segment: Segment, threads: int | None) -> None:
        self.inputs, self.outputs, self.taps = segment.inputs, segment.outputs, segment.taps
        self._names = [*self.outputs, *(n for n in self.taps if n not in self.outputs)]
        onnxruntime = import_onnxruntime()
        options = session_options(onnxruntime, threads)
        # An arena never returns memory, so one arena per piece would add up.
        options.enable_cpu_mem_arena = False
        # Load from a file, because onnxruntime keeps a model in bytes as long as the session. Keep
        # the weights in a separate file, which is mapped and may exceed the 2 GB of a protobuf.
        with temporary_folder() as folder:
            file = folder / "piece.onnx"
            write_model(segment.model, file, beside=True)
            try:
                self._session: Any = onnxruntime.InferenceSession(
                    file, options, providers=["CPUExecutionProvider"]
                )
            # onnxruntime raises one class per status code, without a common base.
            except Exception as exc:
                raise SessionError(
                    f"calibration cannot load a piece of the graph: {first_line(exc)}"
                ) from exc

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            results = self._session.run(self._names, {name: tensors[name] for name in self.inputs})
        except Exception as exc:
            raise SessionError(f"calibration: onnxruntime failed: {first_line(exc)}") from exc
        return dict(zip(self._names, results, strict=True))
