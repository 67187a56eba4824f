"""A session that collects histograms of the internal tensors of its graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir

from tap_deploy.bundle.variant import Variant
from tap_deploy.engines.calibration.histogram import MagnitudeHistogram
from tap_deploy.engines.calibration.pieces import SegmentedRun, segments_from_model
from tap_deploy.sessions.contract import Session, Tensors

ChooseTensors = Callable[[ir.Model], Collection[str]]

TAP_LIMIT_BYTES = 512 << 20
# Expected sizes of a call. With larger ones, the taps of a piece exceed the memory limit.
EXPECTED_SIZES = {"B": 1, "P": 8, "N": 10, "M": 1, "Q": 8, "T": 40, "K": 1}


class CollectingSession(Session):
    """Runs an fp32 graph and collects a histogram of every tapped tensor.

    Predictor and decode loop use it like any session, so the histograms contain the values that
    the graph sees in use.

    Attributes:
        histograms: tensor name -> histogram, empty before the first call.
    """

    def __init__(
        self,
        variant: Variant,
        graph: str,
        tensors: Collection[str] | ChooseTensors,
        *,
        threads: int | None = None,
        limit_bytes: int = TAP_LIMIT_BYTES,
    ) -> None:
        """Load a graph.

        Args:
            variant: the fp32 graphs.
            graph: name of the graph to load.
            tensors: names of the tensors to tap, which may include graph inputs; or a function
                that returns them for the parsed graph.
            threads: CPU threads; None for one per core.
            limit_bytes: limit on the tapped tensors that are alive at once, bytes.

        Raises:
            InputError: the graph does not have a tensor.
            SessionError: onnxruntime cannot load the graph.
        """
        super().__init__(variant.specs[graph])
        model = variant.load(graph)
        names = tensors(model) if callable(tensors) else tensors
        self.histograms = {name: MagnitudeHistogram() for name in sorted(names)}
        segments = segments_from_model(model, names, sizes=EXPECTED_SIZES, limit_bytes=limit_bytes)
        self._run_segments: SegmentedRun | None = SegmentedRun(segments, threads=threads)
        del model, segments
        gc.collect()  # frees the model; the sessions hold the weights

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
        """Drop the sessions and keep the histograms."""
        self._run_segments = None
