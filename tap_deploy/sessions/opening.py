"""Sessions and pipelines for the graphs of a bundle."""

from __future__ import annotations

import contextlib
import os

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.marks import check_mark
from tap_deploy.bundle.variant import Variant
from tap_deploy.errors import BundleError, SessionError
from tap_deploy.graphs import GraphSpec
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.host_pipeline import HostPipeline
from tap_deploy.sessions.loader import Loader
from tap_deploy.sessions.options import DeviceOptions
from tap_deploy.sessions.pipeline import Pipeline
from tap_deploy.sessions.run_on import ENGINE_BACKENDS, RunOn


def create_session(
    backend: str, path: str | os.PathLike[str], spec: GraphSpec, *, threads: int | None = None
) -> Session:
    """Load the graph in an ONNX file on the CPU.

    Args:
        backend: ``onnxruntime``; engines are loaded from a bundle, which vouches for their plans.
        path: the ONNX file.
        spec: what the graph must look like.
        threads: CPU threads for one call; None for one per core that this process may use.

    Raises:
        InputError: ``threads`` is below 1 or far above the number of CPUs.
        SessionError: the backend is unknown or missing, or the graph does not load or fit.
    """
    if backend in ENGINE_BACKENDS:
        raise SessionError(f"backend {backend!r} runs no ONNX file; use sessions_from_bundle")
    run_on = RunOn(backend=backend, threads=threads)
    from tap_deploy.sessions.ort.session import OnnxRuntimeSession

    return OnnxRuntimeSession(path, spec, threads=run_on.threads)


def sessions_from_variant(variant: Variant, *, threads: int | None = None) -> dict[str, Session]:
    """Load the graphs of a variant in onnxruntime on the CPU; verdicts are not checked.

    Args:
        variant: the graphs, of a bundle or from ``Variant.with_graphs``.
        threads: CPU threads for one call; None for one per core that this process may use.

    Returns:
        graph name -> session.

    Raises:
        InputError: ``threads`` is below 1 or far above the number of CPUs.
        SessionError: onnxruntime is missing, or a graph does not load or fit.
    """
    with contextlib.ExitStack() as opened:
        sessions = {
            graph: opened.enter_context(
                create_session("onnxruntime", variant.path(graph), spec, threads=threads)
            )
            for graph, spec in variant.specs.items()
        }
        opened.pop_all()
    return sessions


def sessions_from_bundle(
    bundle: Bundle, run_on: RunOn, options: DeviceOptions | None = None
) -> dict[str, Session]:
    """Load the three graphs of a bundle behind the contract of host arrays, by graph name.

    This serves to run one graph after the other. Between two graphs, tensors pass through host
    memory; ``pipeline_from_bundle`` leaves them on the GPU.

    Args:
        bundle: an opened bundle.
        run_on: what runs the graphs.
        options: choices for a GPU.

    Raises:
        BundleError: the bundle does not hold this precision or plan, or it failed its check.
        InputError: the provider is unknown.
        SessionError: a graph does not load, or a provider does not work.
        MissingDependencyError: a package is not installed.
    """
    return _checked_loader(bundle, run_on).sessions(options or DeviceOptions())


def pipeline_from_bundle(
    bundle: Bundle, run_on: RunOn, options: DeviceOptions | None = None
) -> Pipeline:
    """Load the three graphs of a bundle as one path from picture to captions.

    Arguments and errors as in ``sessions_from_bundle``.
    """
    loader, options = _checked_loader(bundle, run_on), options or DeviceOptions()
    if run_on.on_cpu:
        return HostPipeline(loader.sessions(options), bundle.config)
    return loader.pipeline(options)


def check_verdict(bundle: Bundle, variant: str) -> None:
    """Refuse a variant that failed its verdict.

    Raises:
        BundleError: it failed.
    """
    verdict = bundle.manifest.precision_record(variant).verdict
    if verdict is not None and not verdict.passed:
        raise BundleError(
            f"bundle {bundle.path}: {variant} failed its accuracy check and is not to be used; "
            "use another precision, or allow it with --allow-failed"
        )


def _checked_loader(bundle: Bundle, run_on: RunOn) -> Loader:
    if not run_on.allow_failed:
        check_verdict(bundle, run_on.variant)
        if not run_on.is_engine:  # the verdicts of engines lie beside their plans
            check_mark(bundle, run_on.variant, run_on.mark_name)
    return Loader(bundle=bundle, run_on=run_on)
