"""``tap-export verify``: is a bundle still the model?"""

from __future__ import annotations

import contextlib
import json
import pathlib

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.golden import GoldenSample
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
from tap_deploy.console.extras import require_export_extra
from tap_deploy.console.progress import stage_bar
from tap_deploy.optional_modules import require_module
from tap_deploy.precisions import FP16, variant_for
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.opening import ENGINE_BACKENDS, sessions_from_bundle
from tap_deploy.sessions.options import CPU, Device
from tap_deploy.verify.graph_check import Report, verify_sessions
from tap_deploy.verify.tolerances import tolerances_for

CHECKS_PER_SAMPLE = 9


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
    as_json: bool,
) -> None:
    """Run BUNDLE on its golden samples, stage by stage; exit with 1 if an output is off.

    Needs no torch, unless --checkpoint is given. onnxruntime computes fp16 in fp32 on a CPU, which
    would hide overflow: each value is then rounded to fp16, as a GPU does it. That needs
    "tap-deploy[quantize]".
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
            device=device,
            provider=provider,
            allow_failed=allow_failed,
        )
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
    report.require(f"bundle {bundle} differs from the reference; do not use it")


def verify_bundle(
    bundle: Bundle,
    samples: list[GoldenSample],
    backend: str,
    precision: str,
    threads: int | None = None,
    on_check: object = None,
    *,
    device: str | None = None,
    provider: str | None = None,
    allow_failed: bool = False,
) -> Report:
    """Load the graphs of a bundle and compare them with samples.

    On a CPU, every value that an fp16 graph has in fp16 is rounded to it: onnxruntime by itself
    computes in fp32 there, see ``tap_deploy.engines.fp16.rounding``.
    """
    is_engine = backend in ENGINE_BACKENDS
    on_cpu = device is None or Device.from_name(device).kind == CPU
    variant = variant_for(precision, on_cpu=on_cpu and not is_engine)
    bundle.variant(variant)  # a missing variant has to be the first error
    tolerances = tolerances_for(precision, bundle.manifest.precision_record(variant))
    with contextlib.ExitStack() as stack:
        if on_cpu and not is_engine and provider is None and precision == FP16:
            sessions = _rounding_sessions(bundle, threads)
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
            backend=backend,
            precision=precision,
            tolerances=tolerances,
            on_check=lambda check: on_check(check.tensor) if callable(on_check) else None,
        )


def _rounding_sessions(bundle: Bundle, threads: int | None) -> dict[str, Session]:
    require_module("onnx_ir", "a check of fp16 on a CPU", "quantize")
    from tap_deploy.engines.fp16.rounding import load_rounding

    fp16 = bundle.variant(FP16)
    return {
        name: load_rounding(fp16.path(name), spec, threads=threads)
        for name, spec in fp16.specs.items()
    }


def _samples(bundle: Bundle, checkpoint: pathlib.Path | None) -> list[GoldenSample]:
    if checkpoint is None:
        return [GoldenSample.load(bundle.golden_path())]
    require_export_extra()
    from tap_deploy.export.samples import golden_samples
    from tap_deploy.reference.checkpoint import load_checkpoint

    model, _ = load_checkpoint(checkpoint, bundle.config)
    return golden_samples(model)
