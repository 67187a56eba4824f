"""``tap-export verify``: is a bundle still the model?"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from tap_deploy.bundle import Bundle
from tap_deploy.cli.extras import require_export_extra
from tap_deploy.cli.options import (
    FILE,
    allow_failed_option,
    backend_option,
    bundle_argument,
    device_option,
    json_option,
    precision_option,
    provider_option,
    threads_option,
)
from tap_deploy.cli.progress import stage_bar
from tap_deploy.errors import MissingDependencyError
from tap_deploy.golden import GoldenSample
from tap_deploy.graphs import IMAGE_ENCODER
from tap_deploy.precisions import FP16, variant_for
from tap_deploy.sessions import ENGINE_BACKENDS, sessions_from_bundle
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.options import CPU, Device
from tap_deploy.tolerances import tolerances_for
from tap_deploy.verify import Report, verify_sessions

if TYPE_CHECKING:
    from tap_deploy.engines.evaluators import Evaluator

CHECKS_PER_SAMPLE = 9

AUTO, BACKEND = "auto", "backend"
TORCH_HALF, ONNX_REFERENCE = "torch-half", "onnx-reference"  # as in tap_deploy.engines.evaluators


@click.command("verify")
@bundle_argument
@backend_option
@precision_option
@device_option
@provider_option
@threads_option
@allow_failed_option
@click.option(
    "--checkpoint",
    type=FILE,
    help="Compare with PyTorch on these weights, on more samples than the bundle holds.",
)
@click.option(
    "--evaluator",
    default=AUTO,
    show_default=True,
    type=click.Choice([AUTO, TORCH_HALF, ONNX_REFERENCE, BACKEND]),
    help="What runs the graphs. auto: the backend, but for fp16 on a CPU something that rounds "
    "to fp16 after every node.",
)
@json_option
def verify_command(
    bundle: str,
    backend: str,
    precision: str,
    device: str | None,
    provider: str | None,
    threads: int | None,
    allow_failed: bool,
    checkpoint: pathlib.Path | None,
    evaluator: str,
    as_json: bool,
) -> None:
    """Run BUNDLE on its golden samples, stage by stage; exit with 1 if an output is off.

    Needs no torch, unless --checkpoint is given. fp16 on a CPU needs torch, or onnx for a small
    model: onnxruntime's CPU provider hides overflow. Without either, passing comparisons prove
    nothing, and the exit code is 2, unless --evaluator backend asked for them.
    """
    opened = Bundle.open(bundle)
    samples = _samples(opened, checkpoint)
    with stage_bar("verify", CHECKS_PER_SAMPLE * len(samples)) as stage:
        report = verify_bundle(
            opened,
            samples,
            backend,
            precision,
            threads,
            stage,
            evaluator,
            device=device,
            provider=provider,
            allow_failed=allow_failed,
        )
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
    report.require(f"bundle {bundle} differs from the reference; do not use it")
    if not report.is_witness and evaluator == AUTO:
        raise MissingDependencyError(
            f"{precision} is not proven: {backend} on a CPU hides overflow, and nothing that "
            'rounds to fp16 is installed; install it with: pip install "tap-deploy[export]"'
        )


def verify_bundle(
    bundle: Bundle,
    samples: list[GoldenSample],
    backend: str,
    precision: str,
    threads: int | None = None,
    on_check: object = None,
    evaluator: str = AUTO,
    *,
    device: str | None = None,
    provider: str | None = None,
    allow_failed: bool = False,
) -> Report:
    """Load the graphs of a bundle and compare them with samples.

    Graphs that compute in fp16 are run by something that rounds as they say: onnxruntime's CPU
    provider does not.
    """
    chosen = None
    is_engine = backend in ENGINE_BACKENDS
    on_cpu = device is None or Device.from_name(device).kind == CPU
    hides_overflow = not is_engine and on_cpu and precision == FP16
    variant = variant_for(precision, on_cpu=on_cpu and not is_engine)
    bundle.graph_path(IMAGE_ENCODER, variant)  # that there is no such graph is to be said first
    tolerances = tolerances_for(precision, bundle.manifest.precisions.get(variant, {}))
    if evaluator in (TORCH_HALF, ONNX_REFERENCE) or (evaluator == AUTO and hides_overflow):
        chosen = _rounding_evaluator(bundle, precision, None if evaluator == AUTO else evaluator)
    with contextlib.ExitStack() as stack:
        if chosen is not None:
            sessions: Mapping[str, Session] = chosen.sessions
        else:
            sessions = sessions_from_bundle(
                bundle,
                backend,
                precision,
                threads=threads,
                device=device,
                provider=provider,
                allow_failed=allow_failed,
            )
        for session in sessions.values():
            stack.enter_context(session)
        return verify_sessions(
            sessions,
            bundle.config,
            samples,
            backend=backend if chosen is None else "cpu",
            precision=precision,
            tolerances=tolerances,
            evaluator=backend if chosen is None else chosen.name,
            is_witness=chosen is not None or not hides_overflow,
            on_check=lambda check: on_check(check.tensor) if callable(on_check) else None,
        )


def _rounding_evaluator(bundle: Bundle, precision: str, name: str | None) -> Evaluator | None:
    from tap_deploy.engines.evaluators import rounding_evaluator

    variant = variant_for(precision, on_cpu=False)
    specs = bundle.graph_specs(variant)
    paths = {graph: bundle.graph_path(graph, variant) for graph in specs}
    return rounding_evaluator(paths, specs, name)


def _samples(bundle: Bundle, checkpoint: pathlib.Path | None) -> list[GoldenSample]:
    if checkpoint is None:
        return [GoldenSample.load(bundle.golden_path())]
    require_export_extra()
    from tap_deploy.export.samples import golden_samples
    from tap_deploy.reference.checkpoint import load_checkpoint

    model, _ = load_checkpoint(checkpoint, bundle.config)
    return golden_samples(model)
