"""From a bundle to sessions or a pipeline: checks what a caller asks for."""

from __future__ import annotations

import contextlib
import os

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.marks import check_mark, mark_name
from tap_deploy.bundle.variant import Variant
from tap_deploy.errors import BundleError, InputError, SessionError
from tap_deploy.graphs import GraphSpec
from tap_deploy.machine.cpu import usable_cpus
from tap_deploy.precisions import variant_for
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.host_pipeline import HostPipeline
from tap_deploy.sessions.loader import Loader
from tap_deploy.sessions.options import CPU, CUDA, Device, DeviceOptions
from tap_deploy.sessions.pipeline import Pipeline

ENGINE_BACKENDS = ("tensorrt", "tensorrt_rtx")
BACKENDS = ("onnxruntime", *ENGINE_BACKENDS)
# More than a few threads per CPU bring a machine down: onnxruntime's wait by spinning.
THREADS_PER_CPU = 4


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
    _check_threads(threads)
    _check_backend(backend)
    if backend in ENGINE_BACKENDS:
        raise SessionError(f"backend {backend!r} runs no ONNX file; use sessions_from_bundle")
    from tap_deploy.sessions.ort.session import OnnxRuntimeSession

    return OnnxRuntimeSession(path, spec, threads=threads)


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
    bundle: Bundle,
    backend: str,
    precision: str,
    *,
    threads: int | None = None,
    device: str | None = None,
    provider: str | None = None,
    options: DeviceOptions | None = None,
    allow_failed: bool = False,
) -> dict[str, Session]:
    """Load the three graphs of a bundle behind the contract of host arrays, by graph name.

    That is the way to look at one graph after the other; a GPU is used as it should be by
    ``pipeline_from_bundle``. The arguments are the same.

    Raises:
        BundleError: the bundle does not hold this precision, or it failed its check.
        InputError: arguments that cannot be used, or not together.
        SessionError: a graph does not load, or a provider does not work.
        MissingDependencyError: a package is not installed.
    """
    chosen = _chosen(bundle, backend, precision, threads, device, provider, allow_failed)
    return chosen.sessions(DeviceOptions() if options is None else options)


def pipeline_from_bundle(
    bundle: Bundle,
    backend: str,
    precision: str,
    *,
    threads: int | None = None,
    device: str | None = None,
    provider: str | None = None,
    options: DeviceOptions | None = None,
    allow_failed: bool = False,
) -> Pipeline:
    """Load the three graphs of a bundle as one path from picture to captions.

    Args:
        bundle: an opened bundle.
        backend: one of ``BACKENDS``.
        precision: one of ``precisions.PRECISIONS``.
        threads: CPU threads of a call, only on the CPU; None for one per core that this process
            may use.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None for the CPU with onnxruntime, and for the
            first GPU with an engine.
        provider: how onnxruntime uses a GPU: ``cuda`` (default), ``tensorrt`` or
            ``nv_tensorrt_rtx``.
        options: choices for a GPU.
        allow_failed: also load what failed its verdict or self-test.

    Raises:
        BundleError: the bundle does not hold this precision or plan, or it failed its check.
        InputError: arguments that cannot be used, or not together.
        SessionError: a graph does not load, or a provider does not work.
        MissingDependencyError: a package is not installed.
    """
    chosen = _chosen(bundle, backend, precision, threads, device, provider, allow_failed)
    options = DeviceOptions() if options is None else options
    if chosen.device.kind == CPU:
        return HostPipeline(chosen.sessions(options), bundle.config)
    return chosen.pipeline(options)


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


def _chosen(
    bundle: Bundle,
    backend: str,
    precision: str,
    threads: int | None,
    device: str | None,
    provider: str | None,
    allow_failed: bool,
) -> Loader:
    _check_threads(threads)
    _check_backend(backend)
    is_engine = backend in ENGINE_BACKENDS
    where = Device.from_name(device or (CUDA if is_engine else CPU))
    if is_engine and where.kind == CPU:
        raise InputError(f"backend {backend!r} needs a GPU; got device {device!r}")
    if provider is not None and (is_engine or where.kind == CPU):
        raise InputError("a provider is for backend 'onnxruntime' with device 'cuda'")
    if threads is not None and where.kind != CPU:
        raise InputError("threads are for device 'cpu'; leave them out on a GPU")
    variant = variant_for(precision, on_cpu=where.kind == CPU)
    if not allow_failed:
        check_verdict(bundle, variant)
    if not allow_failed and not is_engine:  # engines keep theirs beside their plans
        name = mark_name(backend, on_cpu=where.kind == CPU, provider=provider)
        check_mark(bundle, variant, name)
    return Loader(
        bundle=bundle,
        backend=backend,
        variant=variant,
        device=where,
        provider=provider,
        threads=threads,
        allow_failed=allow_failed,
    )


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise SessionError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")


def _check_threads(threads: int | None) -> None:
    if threads is not None:
        most = THREADS_PER_CPU * usable_cpus()
        if type(threads) is not int or not 1 <= threads <= most:
            raise InputError(
                f"threads is {threads!r}; expected 1 to {most}, or None for one per core"
            )
