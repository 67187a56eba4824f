"""Comparison of two graphs tensor by tensor, up to the first layer out of tolerance."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from tap_deploy.engines.bisect.bisection import Bisection, Divergence, LayerError
from tap_deploy.engines.bisect.pair import GraphPair, load_pair
from tap_deploy.engines.calibration.pieces import Piece, positions, segments_at, tensor_groups
from tap_deploy.errors import InputError
from tap_deploy.verify.difference import Difference, difference
from tap_deploy.verify.tolerances import Tolerance

Tensors = Mapping[str, np.ndarray]

LIMIT_BYTES = 128 << 20
OTHER_SHAPE = "another shape"


def first_divergence(
    subject: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    feeds: Sequence[Tensors],
    tolerance: Tolerance,
    *,
    rescaled: Collection[str] = (),
    threads: int | None = None,
    limit_bytes: int = LIMIT_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> Bisection:
    """Find the first layer of a graph whose output leaves tolerance.

    Both graphs run on onnxruntime's CPU provider with the same options, piece by piece, on the same
    inputs. All tensors that both graphs have are compared in the order of the subject. The
    search stops after the piece with the first one that leaves tolerance. Each graph reads its
    own intermediate tensors, so errors add up from layer to layer, as in use.

    onnxruntime does not fuse nodes across a compared tensor. An error of a fused kernel therefore
    does not show.

    Args:
        subject: the ONNX file to examine. fp16 values are rounded to fp16, which onnxruntime alone
            does not do on a CPU.
        reference: an fp32 ONNX file of the same model, exported by the same versions of torch and
            onnxscript, which name the tensors.
        feeds: inputs of the graph by name; floats are cast to the dtypes of the subject, and these
            to those of the reference.
        tolerance: bounds for every float tensor; integers and booleans must be equal.
        rescaled: names of nodes whose outputs differ by design: the LayerNormalizations that
            SmoothQuant changed.
        threads: CPU threads; None for one per core.
        limit_bytes: limit on the compared tensors of one graph that are alive at once, bytes.
        on_progress: called with the numbers of compared and of all tensors after each piece.

    Raises:
        BundleError: external weights are not in ``weights_file`` of a path.
        InputError: no feeds, missing inputs, or the graphs have no tensor in common.
        SessionError: a graph does not load or run.
    """
    pair = load_pair(subject, reference, rescaled)
    casted = [_cast(pair.subject, feed) for feed in feeds]
    if not casted:
        raise InputError("bisection has no inputs to run the graphs on; pass at least one")
    groups = tensor_groups(
        pair.subject, pair.layers, sizes=_axis_sizes(pair.subject, casted), limit_bytes=limit_bytes
    )
    sides = (
        _Side(pair.subject, groups, casted, threads),
        _Side(pair.reference, groups, [_cast(pair.reference, feed) for feed in casted], threads),
    )
    search = _Search(pair, tolerance)
    for group in groups:
        for side in sides:
            side.load_next()
        for index in range(len(casted)):
            search.compare(index, group, *(side.run_next(index, group) for side in sides))
        divergence = search.first_of(group)
        if on_progress is not None:
            on_progress(len(search.errors), len(pair.layers))
        if divergence is not None:
            break
    return search.result(divergence)


class _Side:
    """One of the graphs, run piece by piece on all feeds.

    The pieces of both graphs compute the same tensors. Where the other graph computes some of them
    in another order, a piece ends later, and its tensors are kept until they are compared.
    """

    def __init__(
        self,
        model: ir.Model,
        groups: Sequence[Sequence[str]],
        feeds: Sequence[Tensors],
        threads: int | None,
    ) -> None:
        self._alive = [dict(feed) for feed in feeds]
        self._waiting: list[dict[str, np.ndarray]] = [{} for _ in feeds]
        self._threads = threads
        made = positions(model)
        lasts = np.maximum.accumulate([max(made[name] for name in group) for group in groups])
        self._stops = iter([int(last) + 1 for last in lasts])
        self._stop = 0
        stops = sorted({int(last) + 1 for last in lasts})
        self._segments = segments_at(model, stops, [name for group in groups for name in group])
        self._piece: Piece | None = None

    def load_next(self) -> None:
        """Replace the loaded piece by the one that computes the next group."""
        self._piece, before, self._stop = None, self._stop, next(self._stops)
        if self._stop > before:  # otherwise earlier pieces have computed all of the group
            self._piece = Piece(next(self._segments), self._threads)

    def run_next(self, index: int, group: Sequence[str]) -> dict[str, np.ndarray]:
        """Run the loaded piece on a feed, and return the tensors of a group."""
        waiting = self._waiting[index]
        if self._piece is not None:
            self._alive[index], taps = self._piece.run(self._alive[index])
            waiting |= taps
        return {name: waiting.pop(name) for name in group}


class _Search:
    """The errors of all layers so far."""

    def __init__(self, pair: GraphPair, tolerance: Tolerance) -> None:
        self.pair, self.tolerance = pair, tolerance
        self.errors: dict[str, LayerError] = {}
        self._ranks: dict[str, tuple[bool, float]] = {}  # whether it fails, and its size
        self._other_shape: set[str] = set()

    def compare(self, feed: int, group: Sequence[str], actual: Tensors, expected: Tensors) -> None:
        """Compare the tensors of a group, and keep the worst error of all feeds for each."""
        for name in group:
            if actual[name].shape != expected[name].shape:
                self._other_shape.add(name)
                continue
            error = difference(actual[name], expected[name])
            rank = (not self._fits(actual[name], error), max(error.max_rel, error.mean_rel))
            if name not in self._ranks or rank > self._ranks[name]:
                self._ranks[name] = rank
                node, op_type = self.pair.layers[name]
                self.errors[name] = LayerError(
                    node=node, op_type=op_type, tensor=name, feed=feed, error=error
                )

    def first_of(self, group: Sequence[str]) -> Divergence | None:
        """Return the first tensor of a group that is out of tolerance for any feed."""
        name = next((name for name in group if self._ranks.get(name, (False,))[0]), None)
        if name is None:
            return None
        before = self.pair.layers_before(name)
        fitting = [layer for layer in self.errors if layer in before]
        return Divergence(
            graph=str(self.pair.subject.graph.name),
            layer=self.errors[name],
            before=self.errors[fitting[-1]] if fitting else None,
            tolerance=self.tolerance,
        )

    def result(self, divergence: Divergence | None) -> Bisection:
        """Return the errors up to the divergence, independently of the size of the groups."""
        names = list(self.pair.layers)
        if divergence is not None:
            names = names[: names.index(divergence.layer.tensor) + 1]
        compared = [self.errors[name] for name in names if name in self.errors]
        other_shape = len(self._other_shape.intersection(names))
        return Bisection(
            graph=str(self.pair.subject.graph.name),
            divergence=divergence,
            growth=tuple(layer for layer in compared if layer.tensor in self.pair.milestones),
            compared=len(compared),
            comparable=len(self.pair.layers),
            left_out={**self.pair.left_out, OTHER_SHAPE: other_shape},
        )

    def _fits(self, values: np.ndarray, error: Difference) -> bool:
        if values.dtype.kind != "f":
            return error.max_abs == 0
        return error.fits(self.tolerance)


def _cast(model: ir.Model, feed: Tensors) -> dict[str, np.ndarray]:
    """Return the inputs of a graph with floats in its dtypes.

    Raises:
        InputError: an input is missing or unknown.
    """
    dtypes = {str(value.name): value.dtype for value in model.graph.inputs}
    if feed.keys() != dtypes.keys():
        raise InputError(
            f"bisection of {model.graph.name}: inputs are {sorted(feed)}; expected {sorted(dtypes)}"
        )
    inputs = {}
    for name, dtype in dtypes.items():
        is_float = feed[name].dtype.kind == "f" and dtype is not None
        with np.errstate(over="ignore"):  # infinite in fp16, which the comparison shows
            inputs[name] = np.ascontiguousarray(
                feed[name], dtype.numpy() if is_float and dtype is not None else None
            )
    return inputs


def _axis_sizes(model: ir.Model, feeds: Sequence[Tensors]) -> dict[str, int]:
    """Return the largest size of each dynamic axis of the inputs."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                largest = max(feed[str(value.name)].shape[axis] for feed in feeds)
                sizes[dim.value] = max(sizes.get(dim.value, 0), largest)
    return sizes
