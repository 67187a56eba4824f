"""Temporary sessions of partly quantized graphs, for the mixed-precision search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from tap_deploy.bundle.graph_files import write_model
from tap_deploy.bundle.variant import Variant
from tap_deploy.engines.calibration.table import CalibrationTable
from tap_deploy.engines.qdq.chosen_nodes import ChosenNodes
from tap_deploy.engines.qdq.graph import qdq_from_ranges
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.opening import create_session
from tap_deploy.storage.unfinished import temporary_folder


class CandidateSessions:
    """Quantizes given nodes of an fp32 graph and loads the result in onnxruntime.

    Args:
        variant: the fp32 graphs.
        tables: graph name -> ranges.
        reduce_range: see ``qdq_from_ranges``.
        threads: CPU threads per call; None for one per core.
    """

    def __init__(
        self,
        variant: Variant,
        tables: Mapping[str, CalibrationTable],
        *,
        reduce_range: bool = False,
        threads: int | None = None,
    ) -> None:
        self._variant, self._tables = variant, tables
        self._reduce_range, self._threads = reduce_range, threads
        self._models: dict[str, ir.Model] = {}

    def __call__(self, graph: str, nodes: Sequence[str]) -> Session:
        """Return a session of a graph in which only these nodes are quantized.

        Raises:
            InputError: a node cannot be quantized.
            SessionError: onnxruntime rejects the graph.
        """
        if graph not in self._models:
            self._models[graph] = self._variant.load(graph)
        model = qdq_from_ranges(
            self._models[graph],
            self._tables[graph],
            ChosenNodes(graph=graph, nodes=tuple(nodes)),
            for_cpu=True,
            reduce_range=self._reduce_range,
        )
        with temporary_folder() as folder:
            path = folder / f"{graph}.onnx"
            write_model(model, path)
            spec = self._variant.specs[graph]
            return create_session("onnxruntime", path, spec, threads=self._threads)
