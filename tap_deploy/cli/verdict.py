"""``tap-export verdict``: judges accuracy and speed of the INT8 graphs of a bundle."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.precision_record import Bf16Verdict
from tap_deploy.bundle.update import require_writable
from tap_deploy.cli.verdict_options import JudgeOptions, eager_runtime, judge_options
from tap_deploy.console.extras import require_quantize_extra
from tap_deploy.console.options import (
    FILE,
    backend_option,
    bundle_argument,
    json_option,
    strict_option,
    threads_option,
)
from tap_deploy.console.progress import stage_bar
from tap_deploy.errors import InputError, VerificationError
from tap_deploy.precisions import GRAPHS_IN_BF16, INT8
from tap_deploy.predictor import TapPredictor
from tap_deploy.sessions.opening import sessions_from_bundle
from tap_deploy.sessions.run_on import RunOn

STAGES = 12  # of a verdict, see engines/verdict/judge.py


@click.command("verdict")
@bundle_argument
@backend_option
@judge_options
@click.option(
    "--precision",
    type=click.Choice([INT8, *GRAPHS_IN_BF16]),
    default=INT8,
    show_default=True,
    help="What to judge; bf16 needs --backend openvino or cpu.",
)
@click.option("--prompts", type=FILE, help="JSON with prompts for these pictures; see quantize.")
@strict_option
@threads_option
@json_option
def verdict_command(
    bundle: str,
    backend: str,
    judging: JudgeOptions,
    precision: str,
    prompts: pathlib.Path | None,
    strict: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Judge the INT8 graphs of BUNDLE against its fp32 graphs.

    Repeats the verdict of quantize, for example on another machine.

    Writes the report into the bundle. If INT8 fails, marks the bundle and exits with 1. If it
    passes, float graphs replace the INT8 graphs that are not faster.

    With --precision bf16 or int8+bf16, judges only what bf16 does to the answers.
    """
    opened = Bundle.open(bundle)
    if precision != INT8:
        run_on = RunOn(backend=backend, precision=precision, threads=threads)
        found = judge_bf16_on_pictures(opened, judging, run_on, prompts, strict=strict)
        click.echo(json.dumps(dataclasses.asdict(found), indent=2) if as_json else found.sentence)
        if not found.passed:
            raise VerificationError(f"{precision} failed its accuracy check: {found.sentence}")
        return
    report = judge_bundle(opened, judging, backend, prompts, strict=strict, threads=threads)
    click.echo(json.dumps(report, indent=2) if as_json else report_text(report))
    require_passed(report)


def judge_bundle(
    bundle: Bundle,
    judging: JudgeOptions,
    backend: str,
    prompts: pathlib.Path | None = None,
    *,
    strict: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """Judge the INT8 graphs of a bundle, and store the report in it; see ``judge_on_images``.

    Args:
        bundle: has INT8 graphs.
        judging: pictures and limits.
        backend: what runs the graphs.
        prompts: JSON file with prompts for the pictures; None proposes them.
        strict: stop at an unreadable picture instead of skipping it.
        threads: CPU threads; None for one per core.

    Returns:
        The report, JSON types.

    Raises:
        InputError: there are no pictures to judge on, or the bundle cannot be written.
        BundleError: the bundle lacks graphs.
        MissingDependencyError: a package is not installed.
    """
    require_quantize_extra()
    data = _evaluation_data(judging)
    from tap_deploy.engines.calibration.prompts import CalibrationPrompts
    from tap_deploy.engines.int8.add import pictures_calibrated_on
    from tap_deploy.engines.int8.make import judge_on_images
    from tap_deploy.engines.int8.options import evaluation_images
    from tap_deploy.engines.verdict.judge import require_variants

    require_writable(bundle)
    options = judging.verdict(backend=backend, threads=threads)
    require_variants(bundle, options)
    images = evaluation_images(
        data,
        samples=judging.evaluation_samples,
        calibrated_on=pictures_calibrated_on(bundle),
        strict=strict,
    )
    with stage_bar("judge", STAGES) as stage:
        _, report = judge_on_images(
            bundle,
            images,
            options,
            prompts=None if prompts is None else CalibrationPrompts.from_file(prompts),
            others=eager_runtime(bundle, judging.checkpoint, threads),
            on_stage=stage,
        )
    return report


def judge_bf16_on_pictures(
    bundle: Bundle,
    judging: JudgeOptions,
    run_on: RunOn,
    prompts: pathlib.Path | None = None,
    *,
    strict: bool = False,
) -> Bf16Verdict:
    """Judge bf16 on pictures, and store the verdict; see ``tap_deploy.engines.verdict.bf16``.

    Raises:
        InputError: there are no pictures to judge on, or the bundle cannot be written.
        BundleError: the bundle lacks graphs.
        SessionError: this CPU has no bf16, or a graph fails to run.
        MissingDependencyError: a package is not installed.
    """
    require_quantize_extra()
    from tap_deploy.engines.calibration.prompts import CalibrationPrompts
    from tap_deploy.engines.int8.add import pictures_calibrated_on
    from tap_deploy.engines.int8.options import evaluation_images
    from tap_deploy.engines.verdict.bf16 import judge_bf16
    from tap_deploy.engines.verdict.regions import cases_from_images

    require_writable(bundle)
    images = evaluation_images(
        _evaluation_data(judging),
        samples=judging.evaluation_samples,
        calibrated_on=pictures_calibrated_on(bundle),
        strict=strict,
    )
    own = None if prompts is None else CalibrationPrompts.from_file(prompts)
    options = judging.verdict(backend=run_on.backend, threads=run_on.threads)
    reference = sessions_from_bundle(bundle, RunOn(threads=run_on.threads))
    with TapPredictor(reference, bundle.config) as predictor:
        cases = list(cases_from_images(predictor, images, prompts=own))
    return judge_bf16(bundle, cases, run_on, options.floors)


def _evaluation_data(judging: JudgeOptions) -> pathlib.Path:
    if judging.evaluation_data is None:
        raise InputError(
            "no evaluation pictures; pass pictures outside the calibration data: "
            "--evaluation-data DIR"
        )
    return judging.evaluation_data


def report_text(report: dict[str, Any]) -> str:
    """Return the report as text."""
    from tap_deploy.engines.verdict.tally import evaluated_on
    from tap_deploy.engines.verdict.verdict import FLOAT

    lines = [f"  {graph['sentence']}" for graph in report["graphs"].values()]
    agreement = report["whole"]["agreement"]
    lines.append(f"  {evaluated_on(agreement['regions'], agreement['images'])}")
    titles = {INT8: "best mix", FLOAT: report["float_variant"]}
    for name, latency in report["whole"]["latency_ms"].items():
        title = titles.get(name, name)
        lines.append(f"  picture to captions, {title}: {latency['median_ms']:.3g} ms (median)")
    if budget := report.get("budget"):
        lines.append(f"  {budget['sentence']}")
    return "\n".join([*lines, report["sentence"]])


def require_passed(report: dict[str, Any]) -> None:
    """Raise VerificationError if INT8 failed its verdict."""
    if not report["passed"]:
        raise VerificationError(
            "INT8 failed its accuracy check; the bundle is marked as failed: "
            + "; ".join(report["failures"])
        )
