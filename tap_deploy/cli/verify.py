"""``tap-export verify``: is a bundle still the model?"""

from __future__ import annotations

import json
import pathlib

import click

from tap_deploy.bundle import Bundle
from tap_deploy.cli.extras import require_export_extra
from tap_deploy.cli.options import (
    backend_option,
    bundle_argument,
    json_option,
    precision_option,
    threads_option,
)
from tap_deploy.cli.progress import stage_bar
from tap_deploy.golden import GoldenSample
from tap_deploy.sessions import sessions_from_bundle
from tap_deploy.verify import FP32_TOLERANCE, Report, verify_sessions

CHECKS_PER_SAMPLE = 9


@click.command("verify")
@bundle_argument
@backend_option
@precision_option
@threads_option
@click.option(
    "--checkpoint",
    type=click.Path(path_type=pathlib.Path),
    help="Compare with PyTorch on these weights, on more samples than the bundle holds.",
)
@json_option
def verify_command(
    bundle: str,
    backend: str,
    precision: str,
    threads: int | None,
    checkpoint: pathlib.Path | None,
    as_json: bool,
) -> None:
    """Run BUNDLE on its golden samples, stage by stage; exit with 1 if an output is off.

    Needs no torch, unless --checkpoint is given.
    """
    opened = Bundle.open(bundle)
    samples = _samples(opened, checkpoint)
    with stage_bar("verify", CHECKS_PER_SAMPLE * len(samples)) as stage:
        report = verify_bundle(opened, samples, backend, precision, threads, stage)
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
    report.require(f"bundle {bundle} differs from the reference; do not use it")


def verify_bundle(
    bundle: Bundle,
    samples: list[GoldenSample],
    backend: str,
    precision: str,
    threads: int | None = None,
    on_check: object = None,
) -> Report:
    """Load the graphs of a bundle and compare them with samples."""
    return verify_sessions(
        sessions_from_bundle(bundle, backend, precision, threads=threads),
        bundle.config,
        samples,
        backend=backend,
        precision=precision,
        tolerance=FP32_TOLERANCE,
        on_check=lambda check: on_check(check.tensor) if callable(on_check) else None,
    )


def _samples(bundle: Bundle, checkpoint: pathlib.Path | None) -> list[GoldenSample]:
    if checkpoint is None:
        return [GoldenSample.load(bundle.golden_path())]
    require_export_extra()
    from tap_deploy.export.samples import golden_samples
    from tap_deploy.reference.checkpoint import load_checkpoint

    model, _ = load_checkpoint(checkpoint, bundle.config)
    return golden_samples(model)
