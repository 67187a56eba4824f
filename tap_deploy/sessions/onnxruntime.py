"""Graphs on onnxruntime: the default backend, which needs no GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from tap_deploy.errors import MissingDependencyError, SessionError
from tap_deploy.graphs import GraphSpec, TensorSpec
from tap_deploy.sessions.contract import Session, Tensors

ERRORS_ONLY = 3  # onnxruntime's log severity


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as exc:
        raise MissingDependencyError(
            "backend 'onnxruntime' is not installed; "
            'install it with: pip install "tap-deploy[onnxruntime]"'
        ) from exc
    return onnxruntime


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class OnnxRuntimeSession(Session):
    """A graph on onnxruntime's CPU provider.

    Inputs and outputs are bound at the addresses of the NumPy arrays (IO binding): nothing is
    copied on the way in or out, and an output can be written into a slot of the KV cache.
    """

    def __init__(
        self, path: str | os.PathLike[str], spec: GraphSpec, *, threads: int | None = None
    ) -> None:
        super().__init__(spec)
        self._runtime = _import_onnxruntime()
        options = self._runtime.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = self._runtime.InferenceSession(
                os.fspath(path), options, providers=["CPUExecutionProvider"]
            )
        # onnxruntime raises a class of its own per status code, with no common base.
        except Exception as exc:
            raise self._error(f"onnxruntime cannot load {path}: {_first_line(exc)}") from exc
        self._check_model(self._session.get_inputs(), spec.inputs, "inputs")
        self._check_model(self._session.get_outputs(), spec.outputs, "outputs")

    def _check_model(self, nodes: Any, specs: tuple[TensorSpec, ...], kind: str) -> None:
        found = {node.name: (node.type, _axes(node.shape)) for node in nodes}
        expected = {spec.name: (_onnxruntime_type(spec.dtype), _axes(spec.shape)) for spec in specs}
        if found != expected:
            raise SessionError(
                f"graph {self.spec.name}: {kind} of the file are {found}; expected {expected}; "
                "was it exported by another version? Export it again"
            )

    def _run(self, inputs: Tensors, outputs: Tensors) -> None:
        if self._session is None:
            raise self._error("the session is closed; load it again")
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as exc:
            raise self._error(f"onnxruntime failed: {_first_line(exc)}") from exc

    def close(self) -> None:
        """Drop the session and its arena."""
        self._session = None


def _axes(shape: Sequence[int | str | None]) -> list[int | str]:
    """A shape in which all dynamic axes look alike: files may call them as they like."""
    return [axis if isinstance(axis, int) else "*" for axis in shape]


def _onnxruntime_type(dtype: str) -> str:
    names = {"float32": "float", "float16": "float16"}
    return f"tensor({names.get(dtype, np.dtype(dtype).name)})"
