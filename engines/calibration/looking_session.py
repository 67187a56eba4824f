"""A session that looks at the tensors inside of its graph while it answers."""

from __future__ import annotations

import gc
import os
from collections.abc import Collection

import numpy as np

from tap_deploy.bundle.graph_files import load_graph
from tap_deploy.engines.calibration.histogram import MagnitudeHistogram
from tap_deploy.engines.calibration.pieces import SegmentedRun, segments_from_model
from tap_deploy.graphs import GraphSpec
from tap_deploy.sessions.contract import Session, Tensors

TAP_LIMIT_BYTES = 512 << 20
# What one call is expected to bring; more only means that a piece holds more than the limit.
EXPECTED_SIZES = {"B": 1, "P": 8, "N": 10, "M": 1, "T": 40, "K": 1}


class CollectingSession(Session):
    """The fp32 graph behind the usual contract, with a histogram per tensor of interest.

    Everything above the contract, the predictor and the decode loop, runs on it as it would on
    any session: what is counted is what the graph sees in use.

    Attributes:
        histograms: tensor name -> histogram, also of tensors that nothing was counted of yet.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: GraphSpec,
        tensors: Collection[str],
        *,
        threads: int | None = None,
        limit_bytes: int = TAP_LIMIT_BYTES,
    ) -> None:
        """Load a graph.

        Args:
            path: the fp32 ONNX file.
            spec: what it takes and gives.
            tensors: names of the tensors to look at, graph inputs among them.
            threads: CPU threads; None for one per core.
            limit_bytes: bound on the tapped tensors that are alive at once.

        Raises:
            InputError: the graph has no such tensor.
            SessionError: onnxruntime does not load it.
        """
        super().__init__(spec)
        self.histograms = {name: MagnitudeHistogram() for name in sorted(tensors)}
        model = load_graph(path)
        segments = segments_from_model(
            model, tensors, sizes=EXPECTED_SIZES, limit_bytes=limit_bytes
        )
        self._run_segments: SegmentedRun | None = SegmentedRun(segments, threads=threads)
        del model, segments
        gc.collect()  # the sessions have the weights

    def _run(self, inputs: Tensors, outputs: Tensors) -> None:
        if self._run_segments is None:
            raise self._error("the session is closed; load it again")
        for name in self.histograms.keys() & inputs.keys():
            self._count(name, inputs[name])
        found = self._run_segments.run(inputs, self._count)
        for name, array in outputs.items():
            np.copyto(array, found[name])

    def _count(self, name: str, values: np.ndarray) -> None:
        self.histograms[name].add(values)

    def close(self) -> None:
        """Drop the sessions; the histograms stay."""
        self._run_segments = None
