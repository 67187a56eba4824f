"""Running the pieces of a graph in turn, looking at tensors on the way."""

from __future__ import annotations

import gc
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from tap_deploy.engines.calibration.pieces import Segment
from tap_deploy.errors import SessionError, first_line
from tap_deploy.sessions.ort.session import import_onnxruntime, session_options

OnTap = Callable[[str, np.ndarray], None]


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
