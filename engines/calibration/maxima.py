"""Measurement of the largest magnitude of every float tensor of a graph."""

from __future__ import annotations

import os
import pathlib

import numpy as np
import onnx_ir as ir

from tap_deploy.bundle.graph_files import write_model
from tap_deploy.bundle.variant import Variant
from tap_deploy.errors import SessionError, VerificationError, first_line
from tap_deploy.sessions.contract import Session, Tensors
from tap_deploy.sessions.ort.session import import_onnxruntime, session_options
from tap_deploy.storage.unfinished import temporary_folder


class RangeSession(Session):
    """Runs an fp32 graph with onnxruntime and records the largest magnitude of every float tensor.

    A reduction after each tensor outputs one number instead of the tensor, and nodes run in the
    order of the file, so that no tensor lives longer than in the original graph. Memory use is that
    of a plain run.

    Attributes:
        max_abs: tensor name -> largest magnitude over all runs, including graph inputs.
    """

    def __init__(self, variant: Variant, graph: str, *, threads: int | None = None) -> None:
        super().__init__(variant.specs[graph])
        self.max_abs: dict[str, float] = {}
        model = variant.load(graph)
        self._measured = add_reductions(model)
        with temporary_folder() as folder:
            file = folder / "measured.onnx"
            write_model(model, file)
            self._session = _load(file, threads, graph)

    def _run(self, inputs: Tensors, outputs: Tensors) -> None:
        names = [*outputs, *self._measured.values()]
        try:
            values = self._session.run(names, dict(inputs))  # type: ignore[attr-defined]
        # onnxruntime raises one class per status code, without a common base.
        except Exception as exc:
            raise self._error(f"onnxruntime failed: {first_line(exc)}") from exc
        found = dict(zip(names, values, strict=True))
        for name, array in outputs.items():
            if not np.isfinite(found[name]).all():
                raise VerificationError(
                    f"graph {self.spec.name}: output {name} of the fp32 graph is not finite on a "
                    "sample; lower precision cannot fix that; check the checkpoint"
                )
            np.copyto(array, found[name])
        for tensor, reduction in self._measured.items():
            self._remember(tensor, float(found[reduction]))
        for name, array in inputs.items():
            if array.dtype == np.float32:
                self._remember(name, float(np.abs(array).max()))

    def _remember(self, tensor: str, max_abs: float) -> None:
        self.max_abs[tensor] = max(max_abs, self.max_abs.get(tensor, 0.0))

    def close(self) -> None:
        """Drop the session and keep ``max_abs``."""
        self._session = None


def add_reductions(model: ir.Model) -> dict[str, str]:
    """Add a scalar output with the largest magnitude of each float32 tensor of a graph.

    Each reduction is inserted directly after the node that produces the tensor.

    Returns:
        Name of the tensor -> name of its output.
    """
    graph, measured = model.graph, {}
    for node in list(graph):
        for value in node.outputs:
            if value.dtype != ir.DataType.FLOAT or not value.name:
                continue
            magnitude = ir.node("Abs", [value])
            largest = ir.node("ReduceMax", magnitude.outputs, {"keepdims": 0})
            output = largest.outputs[0]
            output.name = f"{value.name}/max_abs"
            output.dtype, output.shape = ir.DataType.FLOAT, ir.Shape([])
            graph.insert_after(node, [magnitude, largest])
            graph.outputs.append(output)
            measured[value.name] = output.name
    return measured


def _load(file: pathlib.Path, threads: int | None, graph: str) -> object:
    onnxruntime = import_onnxruntime()
    options = session_options(onnxruntime, threads)
    # By default, onnxruntime orders nodes by a reverse depth-first search from the outputs, which
    # would run the reductions last and keep every tensor alive until then.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    try:
        return onnxruntime.InferenceSession(
            os.fspath(file), options, providers=["CPUExecutionProvider"]
        )
    except Exception as exc:
        raise SessionError(
            f"graph {graph}: onnxruntime cannot load it for measuring: {first_line(exc)}"
        ) from exc
