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
        needed_later: names of all tensors that later pieces read, and of the graph outputs.
    """

    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    taps: tuple[str, ...]
    needed_later: frozenset[str]


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
    made = positions(model)
    inputs = {value.name for value in model.graph.inputs}
    unknown = sorted(name for name in taps if name not in made and name not in inputs)
    if unknown:
        raise InputError(f"graph {model.graph.name} has no tensor {unknown[0]!r} to calibrate")
    groups = tensor_groups(model, taps, sizes=sizes, limit_bytes=limit_bytes)
    stops = [made[group[-1]] + 1 for group in groups[:-1]] + [len(model.graph)]
    return segments_at(model, stops, taps)


def positions(model: ir.Model) -> dict[str, int]:
    """Return the position of the node that makes each tensor, by name in the order of the graph."""
    return {str(v.name): position for position, n in enumerate(model.graph) for v in n.outputs}


def tensor_groups(
    model: ir.Model, taps: Collection[str], *, sizes: Mapping[str, int], limit_bytes: int
) -> list[list[str]]:
    """Group tensors in the order of the graph, so that each group stays within a memory limit.

    Arguments as in ``segments_from_model``. There is at least one group, which may be empty.
    """
    groups: list[list[str]] = [[]]
    used, wanted = 0, set(taps)
    for value in (value for node in model.graph for value in node.outputs):
        if value.name not in wanted:
            continue
        size = BYTES_PER_FLOAT * num_values(value, sizes)
        if groups[-1] and used + size > limit_bytes:
            groups.append([])
            used = 0
        groups[-1].append(str(value.name))
        used += size
    return groups


def segments_at(model: ir.Model, stops: Sequence[int], taps: Collection[str]) -> Iterator[Segment]:
    """Yield the pieces that end before the nodes at the given positions.

    Args:
        model: model with nodes in topological order.
        stops: positions in ascending order.
        taps: names of tensors to tap in the pieces that make them.
    """
    nodes, wanted = list(model.graph), set(taps)
    for start, stop in zip([0, *stops[:-1]], stops, strict=True):
        yield _segment(model, nodes[start:stop], nodes[stop:], wanted)


def _segment(
    model: ir.Model, nodes: Sequence[ir.Node], later: Sequence[ir.Node], wanted_taps: set[str]
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
    taps = [str(name) for name in made if name in wanted_taps]
    shown = [*outputs, *(name for name in taps if name not in outputs)]
    graph = ir.convenience.extract(model.graph, list(needed), shown)
    graph.name = model.graph.name
    piece = ir.Model(graph, ir_version=int(model.ir_version or 10))
    return Segment(
        model=piece,
        inputs=tuple(needed),
        outputs=tuple(outputs),
        taps=tuple(taps),
        needed_later=frozenset(map(str, wanted)),
    )


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
            self._pieces.append(Piece(segment, threads))
            # Free the model of the piece now, as its session has the weights. Nodes and values
            # reference each other, so only the garbage collector can free them.
            del segment
            gc.collect()

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
        for piece in self._pieces:
            alive, taps = piece.run(alive)
            for name, values in taps.items():
                on_tap(name, values)
        return alive


class Piece:
    """A piece of a graph, loaded into onnxruntime's CPU provider."""

    def __init__(self, segment: Segment, threads: int | None) -> None:
        """Load a piece.

        Raises:
            SessionError: onnxruntime cannot load it.
        """
        self.inputs, self.outputs, self.taps = segment.inputs, segment.outputs, segment.taps
        self._needed_later = segment.needed_later
        self._graph = segment.model.graph.name
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
                    f"graph {self._graph}: onnxruntime cannot load a piece of it: {first_line(exc)}"
                ) from exc

    def run(
        self, alive: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Run the piece.

        Args:
            alive: the inputs of the piece by name, and other tensors.

        Returns:
            The tensors that later pieces need, with the graph outputs so far; and the tapped ones.

        Raises:
            SessionError: onnxruntime failed.
        """
        try:
            values = self._session.run(self._names, {name: alive[name] for name in self.inputs})
        except Exception as exc:
            raise SessionError(
                f"graph {self._graph}: onnxruntime failed: {first_line(exc)}"
            ) from exc
        found = dict(zip(self._names, values, strict=True))
        kept = {n: v for n, v in {**alive, **found}.items() if n in self._needed_later}
        return kept, {name: found[name] for name in self.taps}
