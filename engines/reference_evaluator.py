"""A typed graph on onnx's reference evaluator: NumPy, which rounds to fp16 after every node too."""

from __future__ import annotations

import os

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from tap_deploy.graphs import GraphSpec
from tap_deploy.onnx_files import load_graph
from tap_deploy.sessions.contract import Session, Tensors


class OnnxReferenceSession(Session):
    """Executes a graph with ``onnx.reference``: slow, so for small models only."""

    def __init__(self, path: str | os.PathLike[str], spec: GraphSpec) -> None:
        super().__init__(spec)
        model = ir.external_data.load_to_model(load_graph(path))
        self._evaluator: ReferenceEvaluator | None = ReferenceEvaluator(ir.to_proto(model))

    def _run(self, inputs: Tensors, outputs: Tensors) -> None:
        if self._evaluator is None:
            raise self._error("the session is closed; load it again")
        with np.errstate(all="ignore"):  # infinities are a result here, not an accident
            results = self._evaluator.run(list(outputs), dict(inputs))
        for array, result in zip(outputs.values(), results, strict=True):
            np.copyto(array, np.asarray(result), casting="no")

    def close(self) -> None:
        """Drop the evaluator."""
        self._evaluator = None
