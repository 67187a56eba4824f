"""A graph cut into pieces that run one after the other, so that few tensors are alive at once."""

from __future__ import annotations

import dataclasses
import gc
import math
import pathlib
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from tap_deploy.errors import InputError, SessionError, first_line
from tap_deploy.sessions.ort.session import import_onnxruntime, session_options

OnTap = Callable[[str, np.ndarray], None]


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


class SegmentedRun:
    """The pieces of a graph on onnxruntime's CPU provider, loaded once."""

    def __init__(self, segments: Iterable[Segment], *, threads: int | None = None) -> None:
        self._pieces = []
        for segment in segments:
            self._pieces.append(_Piece(segment, threads))
            # The weights of a piece live in its session. The model that they came from may go,
            # but nodes and values refer to each other, and nothing else would find them in time.
            del segment
            gc.collect()
        last_use = {name: i for i, piece in enumerate(self._pieces) for name in piece.inputs}
        self._last_use = last_use

    def run(self, inputs: Mapping[str, np.ndarray], on_tap: OnTap) -> dict[str, np.ndarray]:
        """Run all pieces; hand every tapped tensor on, and drop it when no piece needs it.

        Args:
            inputs: of the whole graph, by name.
            on_tap: called with the name and the values of each tapped tensor.

        Returns:
            the tensors that no piece reads any more: the outputs of the graph.

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
        # An arena never gives memory back; with one per piece they would add up.
        options.enable_cpu_mem_arena = False
        # From a file, and not from bytes, which onnxruntime would keep as long as the session; with
        # the weights beside it, which are mapped, and may be more than a protobuf can hold.
        with tempfile.TemporaryDirectory(prefix="tap-piece-", ignore_cleanup_errors=True) as folder:
            file = pathlib.Path(folder) / "piece.onnx"
            ir.save(segment.model, file, external_data=f"{file.name}.data")
            try:
                self._session: Any = onnxruntime.InferenceSession(
                    file, options, providers=["CPUExecutionProvider"]
                )
            # onnxruntime raises a class of its own per status code, with no common base.
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
