"""Functions that load the graphs of a bundle as sessions or pipelines."""

from __future__ import annotations

import contextlib
import logging
import os

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.marks import check_mark, verified_on
from tap_deploy.bundle.variant import Variant
from tap_deploy.errors import BundleError, SessionError
from tap_deploy.graphs import GraphSpec
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.loader import Loader
from tap_deploy.sessions.options import DeviceOptions
from tap_deploy.sessions.pipeline import Pipeline
from tap_deploy.sessions.run_on import ENGINE_BACKENDS, FASTEST_ON_CPU, OPENVINO, RunOn
from tap_deploy.sessions.verified import check_verified

logger = logging.getLogger(__name__)


def create_session(
    backend: str, path: str | os.PathLike[str], spec: GraphSpec, *, threads: int | None = None
) -> Session:
    """Load the graph in an ONNX file on the CPU.

    Args:
        backend: ``onnxruntime`` or ``openvino``. Engines must be loaded from a bundle, which has
            the SHA-256 of their plans.
        path: the ONNX file.
        spec: expected inputs and outputs.
        threads: CPU threads per call; None for one per usable core.

    Raises:
        InputError: ``threads`` is below 1 or far above the number of CPUs.
        SessionError: the backend is unknown or missing, the graph cannot be loaded, or it does not
            match ``spec``.
    """
    if backend in (FASTEST_ON_CPU, *ENGINE_BACKENDS):
        raise SessionError(f"backend {backend!r} needs a bundle; use sessions_from_bundle")
    run_on = RunOn(backend=backend, threads=threads)
    if backend == OPENVINO:
        from tap_deploy.sessions.openvino.session import OpenVinoSession

        return OpenVinoSession(path, spec, threads=run_on.threads)
    from tap_deploy.sessions.ort.session import OnnxRuntimeSession

    return OnnxRuntimeSession(path, spec, threads=run_on.threads)


def sessions_from_variant(variant: Variant, *, threads: int | None = None) -> dict[str, Session]:
    """Load the graphs of a variant in onnxruntime on the CPU, even if they failed a verdict.

    Args:
        variant: variant of a bundle, or the result of ``Variant.with_graphs``.
        threads: CPU threads per call; None for one per usable core.

    Returns:
        Graph name -> session.

    Raises:
        InputError: ``threads`` is below 1 or far above the number of CPUs.
        SessionError: onnxruntime is missing, a graph cannot be loaded, or its inputs or outputs
            differ from its record.
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
    """Load the three graphs of a bundle as sessions on host arrays, by graph name.

    Outputs are copied to host memory after each graph; ``pipeline_from_bundle`` keeps them on the
    GPU.

    Args:
        bundle: an opened bundle.
        run_on: backend, precision and device.
        options: GPU options.

    Raises:
        BundleError: the bundle lacks this precision or plan, or it failed its verdict or self-test.
        InputError: the provider is unknown.
        SessionError: a graph cannot be loaded, or a provider does not work.
        MissingDependencyError: a package is not installed.
    """
    return _checked_loader(bundle, run_on).sessions(options or DeviceOptions())


def pipeline_from_bundle(
    bundle: Bundle, run_on: RunOn, options: DeviceOptions | None = None
) -> Pipeline:
    """Load the three graphs of a bundle as one pipeline from picture to captions.

    On the CPU, the text decoder is loaded at the first caption, which then raises the errors of
    loading it. Arguments and errors as in ``sessions_from_bundle``.
    """
    loader = _checked_loader(bundle, run_on)
    if not run_on.allow_failed and not run_on.is_engine:  # engines: where their plans are read
        bundle.variant(run_on.variant)  # reports a missing precision first
        machines = verified_on(bundle, run_on.variant, run_on.mark_name)
        subject = f"{run_on.precision} of bundle {bundle.path} with {run_on.mark_name}"
        check_verified(machines, run_on, subject, str(bundle.path))
    return loader.host_pipeline() if run_on.on_cpu else loader.pipeline(options or DeviceOptions())


def check_verdict(bundle: Bundle, run_on: RunOn) -> None:
    """Check that the variant to load has not failed its verdict.

    Raises:
        BundleError: it failed.
    """
    record = bundle.manifest.precision_record(run_on.variant)
    verdicts = [record.verdict, record.bf16_verdict if run_on.in_bf16 else None]
    if not all(verdict is None or verdict.passed for verdict in verdicts):
        raise BundleError(
            f"bundle {bundle.path}: precision {run_on.precision} failed its accuracy check; use "
            "another precision, or pass allow_failed=True (--allow-failed)"
        )


def _note_other_judge(bundle: Bundle, run_on: RunOn) -> None:
    """Log that int8 was judged on another backend, where its answers and speed differ a little."""
    verdict = bundle.manifest.precision_record(run_on.variant).verdict
    if run_on.on_cpu and verdict is not None and verdict.backend != run_on.backend:
        logger.info(
            "int8 was judged on %s, not on %s; judge it with: tap-export verdict %s --backend %s "
            "--evaluation-data DIR",
            verdict.backend,
            run_on.backend,
            bundle.path,
            run_on.backend,
        )


def _checked_loader(bundle: Bundle, run_on: RunOn) -> Loader:
    if not run_on.allow_failed:
        check_verdict(bundle, run_on)
        _note_other_judge(bundle, run_on)
        if not run_on.is_engine:  # self-test results of engines are stored with their plans
            check_mark(bundle, run_on.variant, run_on.mark_name, run_on.words, on_cpu=run_on.on_cpu)
    return Loader(bundle=bundle, run_on=run_on)
