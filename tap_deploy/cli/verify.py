"""``tap-export verify``: compares the graphs of a bundle with its golden samples."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.golden import Golden
from tap_deploy.console.extras import require_export_extra
from tap_deploy.console.options import FILE, bundle_argument, json_option, runtime_options
from tap_deploy.console.progress import stage_bar
from tap_deploy.optional_modules import require_module
from tap_deploy.precisions import FP16
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.opening import sessions_from_bundle
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.verify.comparison import Comparison, Report
from tap_deploy.verify.graph_check import number_of_checks, verify_sessions
from tap_deploy.verify.tolerances import tolerances_for


@click.command("verify")
@bundle_argument
@runtime_options
@click.option(
    "--checkpoint",
    type=FILE,
    help="Compare with PyTorch on these weights, on more samples than the bundle holds.",
)
@json_option
def verify_command(
    bundle: str, run_on: RunOn, checkpoint: pathlib.Path | None, as_json: bool
) -> None:
    """Compare the graphs of BUNDLE with its golden samples.

    Exits with code 1 if an output differs. Needs no torch, unless --checkpoint is given.
    onnxruntime's CPU provider computes fp16 graphs in fp32, which hides overflow, so every
    intermediate value is rounded to fp16; that needs "tap-deploy[quantize]".
    """
    opened = Bundle.open(bundle)
    samples = _samples(opened, checkpoint)
    with stage_bar("verify", number_of_checks(samples)) as stage:
        report = verify_bundle(opened, run_on, samples, on_check=lambda check: stage(check.tensor))
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
    report.require(f"bundle {bundle} differs from the reference; do not use it")


def verify_bundle(
    bundle: Bundle,
    run_on: RunOn,
    samples: list[Golden],
    *,
    on_check: Callable[[Comparison], None] | None = None,
) -> Report:
    """Load the graphs of a bundle and compare their outputs with samples.

    On a CPU, every fp16 value is rounded to fp16, because onnxruntime alone computes in fp32; see
    ``tap_deploy.engines.fp16.rounding``.

    Args:
        bundle: an opened bundle.
        run_on: backend, precision and device that run the graphs.
        samples: inputs and expected outputs.
        on_check: called with every comparison.

    Raises:
        BundleError: the bundle lacks the precision or plan, or it failed its check.
        InputError: prompts of the samples have more points than an engine takes.
        SessionError: a graph does not load or run.
        MissingDependencyError: a package is not installed.
    """
    bundle.variant(run_on.variant)  # reports a missing precision first
    tolerances = tolerances_for(run_on.precision, bundle.manifest.precision_record(run_on.variant))
    with contextlib.ExitStack() as stack:
        if run_on.on_cpu and run_on.precision == FP16:
            sessions = _rounding_sessions(bundle, run_on.threads, stack)
        else:
            sessions = sessions_from_bundle(bundle, run_on)
            for session in sessions.values():
                stack.enter_context(session)
        return verify_sessions(
            sessions,
            bundle.config,
            samples,
            backend=run_on.backend,
            precision=run_on.precision,
            tolerances=tolerances,
            on_check=on_check,
        )


def _rounding_sessions(
    bundle: Bundle, threads: int | None, stack: contextlib.ExitStack
) -> dict[str, Session]:
    require_module("onnx_ir", "a check of fp16 on a CPU", "quantize")
    from tap_deploy.engines.fp16.rounding import load_rounding

    fp16 = bundle.variant(FP16)
    return {
        name: stack.enter_context(load_rounding(fp16.path(name), spec, threads=threads))
        for name, spec in fp16.specs.items()
    }


def _samples(bundle: Bundle, checkpoint: pathlib.Path | None) -> list[Golden]:
    if checkpoint is None:
        return [bundle.golden()]
    require_export_extra()
    from tap_deploy.export.samples import golden_samples
    from tap_deploy.reference.checkpoint import load_checkpoint

    sizes = bundle.manifest.weights_config
    model, _ = load_checkpoint(checkpoint, sizes, image_size=bundle.config.image_size)
    return golden_samples(model)
