"""Backends that run a graph, behind one contract."""

from __future__ import annotations

import os

from tap_deploy.bundle import Bundle
from tap_deploy.errors import InputError, SessionError
from tap_deploy.graphs import GraphSpec
from tap_deploy.precisions import variant_for
from tap_deploy.sessions.contract import Session

BACKENDS = ("onnxruntime",)
# More than a few threads per CPU bring a machine down: onnxruntime's wait by spinning.
THREADS_PER_CPU = 4


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
        InputError: ``threads`` is below 1 or far above the number of CPUs.
        SessionError: the backend is unknown or missing, or the graph does not load or fit.
    """
    if threads is not None:
        most = THREADS_PER_CPU * (os.cpu_count() or 1)
        if type(threads) is not int or not 1 <= threads <= most:
            raise InputError(
                f"threads is {threads!r}; expected 1 to {most}, or None for one per CPU core"
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
    variant = variant_for(precision, on_cpu=True)
    return {
        name: create_session(backend, bundle.graph_path(name, variant), spec, threads=threads)
        for name, spec in bundle.graph_specs(variant).items()
    }
