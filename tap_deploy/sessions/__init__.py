"""Backends that run a graph, behind one contract."""

from __future__ import annotations

import os

from tap_deploy.errors import SessionError
from tap_deploy.graphs import GraphSpec
from tap_deploy.sessions.contract import Session

BACKENDS = ("onnxruntime",)


def create_session(
    backend: str, path: str | os.PathLike[str], spec: GraphSpec, *, threads: int | None = None
) -> Session:
    """Load the graph in ``path`` with a backend.

    Args:
        backend: one of ``BACKENDS``.
        path: the ONNX file.
        spec: what the graph must look like.
        threads: CPU threads for one call; None leaves the choice to the backend.

    Raises:
        SessionError: the backend is unknown or missing, or the graph does not load or fit.
    """
    if backend == "onnxruntime":
        from tap_deploy.sessions.onnxruntime import OnnxRuntimeSession

        return OnnxRuntimeSession(path, spec, threads=threads)
    raise SessionError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
