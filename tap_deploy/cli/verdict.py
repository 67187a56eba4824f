"""``tap-export verdict``: is the INT8 of a bundle fit for use, and does it pay here?"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.update import require_writable
from tap_deploy.cli.options import (
    FILE,
    backend_option,
    bundle_argument,
    json_option,
    strict_option,
    threads_option,
)
from tap_deploy.cli.verdict_options import eager_runtime, options_from, verdict_options
from tap_deploy.console.extras import require_quantize_extra
from tap_deploy.console.progress import stage_bar
from tap_deploy.errors import InputError, VerificationError
from tap_deploy.precisions import INT8

STAGES = 12  # of a judgement, see engines/verdict/judge.py


@click.command("verdict")
@bundle_argument
@backend_option
@verdict_options
@click.option("--prompts", type=FILE, help="JSON with prompts of these pictures; see quantize.")
@strict_option
@threads_option
@json_option
def verdict_command(
    bundle: str,
    backend: str,
    evaluation_data: pathlib.Path | None,
    evaluation_samples: int,
    checkpoint: pathlib.Path | None,
    prompts: pathlib.Path | None,
    strict: bool,
    threads: int | None,
    as_json: bool,
    **floors: Any,
) -> None:
    """Judge the INT8 graphs of BUNDLE against its fp32 graphs, anew or on another machine.

    Writes the report into the bundle. Exits with 1, and marks the bundle, if INT8 is not fit for
    use; puts the float graph in the place of one that does not pay.
    """
    require_quantize_extra()
    if evaluation_data is None:
        raise InputError(
            "nothing to judge on; pass pictures that calibration did not see: --evaluation-data DIR"
        )
    from tap_deploy.engines.calibration.prompts import CalibrationPrompts
    from tap_deploy.engines.int8.add import pictures_calibrated_on
    from tap_deploy.engines.int8.make import judge_on_images
    from tap_deploy.engines.int8.options import evaluation_images
    from tap_deploy.engines.verdict.judge import require_variants

    opened = Bundle.open(bundle)
    require_writable(opened)
    options = options_from(backend=backend, threads=threads, **floors)
    require_variants(opened, options)
    images = evaluation_images(
        evaluation_data,
        samples=evaluation_samples,
        calibrated_on=pictures_calibrated_on(opened),
        strict=strict,
    )
    with stage_bar("judge", STAGES) as stage:
        _, report = judge_on_images(
            opened,
            images,
            options,
            prompts=None if prompts is None else CalibrationPrompts.from_file(prompts),
            others=eager_runtime(opened, checkpoint, threads),
            on_stage=stage,
        )
    click.echo(json.dumps(report, indent=2) if as_json else report_text(report))
    require_passed(report)


def report_text(report: dict[str, Any]) -> str:
    """Return the report for a terminal."""
    from tap_deploy.engines.verdict.verdict import FLOAT

    lines = [f"  {graph['sentence']}" for graph in report["graphs"].values()]
    agreement = report["whole"]["agreement"]
    lines.append(
        f"  {agreement['regions']} regions of {agreement['images']} pictures that calibration did "
        "not see"
    )
    titles = {INT8: "best mix", FLOAT: report["float_variant"]}
    for name, latency in report["whole"]["latency_ms"].items():
        title = titles.get(name, name)
        lines.append(f"  picture to captions, {title}: {latency['median_ms']:.3g} ms (median)")
    if budget := report.get("budget"):
        lines.append(f"  {budget['sentence']}")
    return "\n".join([*lines, report["sentence"]])


def require_passed(report: dict[str, Any]) -> None:
    """Raise VerificationError if INT8 is not fit for use."""
    if not report["passed"]:
        raise VerificationError(
            f"INT8 is not fit for use, the bundle is marked: {'; '.join(report['failures'])}"
        )
