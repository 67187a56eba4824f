"""Backends that run a graph, behind one contract."""

from __future__ import annotations

import os

from tap_deploy.bundle import Bundle
from tap_deploy.errors import InputError, SessionError
from tap_deploy.graphs import GraphSpec
from tap_deploy.sessions.contract import Session

BACKENDS = ("onnxruntime",)
# Far beyond any CPU; onnxruntime makes every thread that it is asked for, until the system ends.
MAX_THREADS = 1024


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
        InputError: ``threads`` is not in 1 … ``MAX_THREADS``.
        SessionError: the backend is unknown or missing, or the graph does not load or fit.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise InputError(
            f"threads is {threads}; expected 1 to {MAX_THREADS}, or None for all cores"
        )
    if backend == "onnxruntime":
        from tap_deploy.sessions.onnxruntime import OnnxRuntimeSession

        return OnnxRuntimeSession(path, spec, threads=threads)
    raise SessionError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")


def sessions_from_bundle(
    bundle: Bundle, backend: str, precision: str, *, threads: int | None = None
) -> dict[str, Session]:
    """Load the three graphs of a bundle, by graph name; see ``create_session``.

    Raises:
        BundleError: the bundle does not hold this precision.
    """
    return {
        name: create_session(backend, bundle.graph_path(name, precision), spec, threads=threads)
        for name, spec in bundle.graph_specs().items()
    }
