"""``tap-export quantize``: int8 graphs for a bundle, calibrated on real pictures."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Any

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.update import require_writable
from tap_deploy.cli.options import (
    FILE,
    bundle_argument,
    force_option,
    json_option,
    strict_option,
    threads_option,
)
from tap_deploy.cli.verdict import report_text, require_passed
from tap_deploy.cli.verdict_options import eager_runtime, options_from, verdict_options
from tap_deploy.console.extras import require_quantize_extra
from tap_deploy.console.progress import stage_bar
from tap_deploy.errors import InputError
from tap_deploy.precisions import CALIBRATION_METHODS, DEFAULT_CALIBRATION_METHOD, FP32

if TYPE_CHECKING:
    from tap_deploy.engines.int8.options import Int8Options

CPU = "onnxruntime"
STAGES = 15  # besides pictures: writing, judging
calibration_data_option = click.option(
    "--calibration-data",
    type=FILE,
    help="For int8: real pictures, as a folder, a picture, or a list of paths (.txt, .json).",
)


@click.command("quantize")
@bundle_argument
@calibration_data_option
@click.option(
    "--prompts",
    type=FILE,
    help='JSON, {"picture.jpg": {"boxes": […], "points": […], "sketches": […]}}; default: drawn.',
)
@click.option(
    "--method",
    type=click.Choice(CALIBRATION_METHODS),
    default=DEFAULT_CALIBRATION_METHOD,
    show_default=True,
    help="How the range of a tensor is chosen.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Pictures to look at, at most.",
)
@click.option("--cache", type=FILE, help="Keep the ranges here; go on after an interruption.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of what is drawn."
)
@click.option("--attention", is_flag=True, help="Quantize the products of attention, too.")
@click.option("--residuals", is_flag=True, help="Quantize the sums of residual branches, too.")
@click.option(
    "--reduce-range",
    is_flag=True,
    help="Weights of 7 bits instead of 8: quicker on x86 CPUs without VNNI, less exact anywhere.",
)
@click.option(
    "--smoothquant",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Move outlier channels into weights: where it is measured to help, everywhere, nowhere.",
)
@click.option(
    "--budget",
    help="What INT8 may cost, e.g. miou=0.005,top1=0.01,tokens=0.02; blocks that cost more stay "
    "float.",
)
@click.option("--exclusions", type=FILE, help="JSON of what stays float, as a budget leaves it.")
@click.option("--no-verdict", is_flag=True, help="Calibrate on all pictures and judge nothing.")
@verdict_options
@strict_option
@threads_option
@force_option
@json_option
def quantize_command(
    bundle: str,
    calibration_data: pathlib.Path | None,
    prompts: pathlib.Path | None,
    method: str,
    samples: int,
    cache: pathlib.Path | None,
    seed: int,
    attention: bool,
    residuals: bool,
    reduce_range: bool,
    smoothquant: str,
    budget: str | None,
    exclusions: pathlib.Path | None,
    no_verdict: bool,
    evaluation_data: pathlib.Path | None,
    evaluation_samples: int,
    checkpoint: pathlib.Path | None,
    strict: bool,
    threads: int | None,
    force: bool,
    as_json: bool,
    **floors: Any,
) -> None:
    """Calibrate BUNDLE on real pictures, add its int8 graphs, and judge them.

    For a CPU over the fp32 graphs; for engines over the fp16 graphs, if the bundle has any. A
    fifth of the pictures is held back to judge on, unless there are others for that. Exits with
    1, and marks the bundle, if INT8 is not fit for use.
    """
    require_quantize_extra()
    if no_verdict and (evaluation_data is not None or checkpoint is not None):
        raise InputError(
            "--no-verdict judges nothing; leave it out, or --evaluation-data and --checkpoint"
        )
    from tap_deploy.engines.int8.blocks import Exclusions
    from tap_deploy.engines.int8.budget import Budget
    from tap_deploy.engines.int8.options import Int8Options, QuantizeOptions

    options = Int8Options(
        quantize=QuantizeOptions(
            calibration_data=calibration_data,
            prompts_file=prompts,
            method=method,
            samples=samples,
            cache=cache,
            force=force,
            seed=seed,
            attention=attention,
            residuals=residuals,
            reduce_range=reduce_range,
            threads=threads,
            strict=strict,
        ),
        smoothquant=smoothquant,
        budget=None if budget is None else Budget.parse(budget),
        exclusions=None if exclusions is None else Exclusions.load(exclusions),
        evaluation_data=evaluation_data,
        evaluation_samples=evaluation_samples,
        verdict=None if no_verdict else options_from(backend=CPU, threads=threads, **floors),
    )
    opened = Bundle.open(bundle)
    require_writable(opened)
    summary = add_int8(opened, options, checkpoint=checkpoint)
    click.echo(json.dumps(summary, indent=2) if as_json else describe_int8(summary))
    if summary["verdict"]:
        require_passed(summary["verdict"])


def add_int8(
    bundle: Bundle, options: Int8Options, *, checkpoint: pathlib.Path | None = None
) -> dict[str, Any]:
    """Quantize a bundle with a progress bar; see ``tap_deploy.engines.int8.make``.

    Args:
        bundle: gets the graphs.
        options: how.
        checkpoint: weights to time PyTorch with, in the same run.

    Returns:
        what was added, JSON types: bundle, calibration, graphs by variant and name, and the
        report of the verdict, empty without one.
    """
    from tap_deploy.engines.int8.make import make_int8
    from tap_deploy.engines.smoothing.channels import MAX_IMAGES
    from tap_deploy.engines.smoothing.smoothed_variant import OFF

    images = options.images()
    count = len(images[0])
    measured = 0 if options.smoothquant == OFF else min(count, MAX_IMAGES)
    with stage_bar("quantize", measured + count + STAGES) as stage:
        result = make_int8(
            bundle,
            options,
            images=images,
            others=eager_runtime(bundle, checkpoint, options.quantize.threads),
            on_stage=stage,
            on_warning=lambda text: click.echo(f"warning: {text}", err=True),
        )
    return _summary(bundle) | {"verdict": result.report}


def _summary(bundle: Bundle) -> dict[str, Any]:
    """What was added, per variant and graph."""
    manifest = bundle.manifest
    calibrations = {
        variant: record.calibration
        for variant, record in manifest.precisions.items()
        if record.calibration is not None
    }
    graphs = {
        variant: {
            name: {
                "file": record.file,
                "quantized_nodes": len(manifest.precisions[variant].quantized_nodes[name]),
                "weights_bytes": record.weights_bytes,
                "fp32_weights_bytes": manifest.graphs[FP32][name].weights_bytes,
            }
            for name, record in manifest.graphs[variant].items()
        }
        for variant in calibrations
    }
    calibration = dataclasses.asdict(next(iter(calibrations.values())))
    return {"bundle": str(bundle.path), "calibration": calibration, "graphs": graphs}


def describe_int8(summary: dict[str, Any]) -> str:
    """Return what was added, for people to read."""
    calibration = summary["calibration"]
    count = calibration["num_samples"]
    lines = [
        f"{summary['bundle']}: int8 ranges by {calibration['method']} on "
        f"{count} picture{'s' if count != 1 else ''}"
    ]
    for variant, graphs in summary["graphs"].items():
        for name, graph in graphs.items():
            size, before = graph["weights_bytes"], graph["fp32_weights_bytes"]
            lines.append(
                f"  {variant:10} {name:15} {graph['quantized_nodes']:4} nodes in int8, weights "
                f"{size / 1e6:.1f} MB (fp32: {before / 1e6:.1f} MB)"
            )
    if report := summary["verdict"]:
        lines.append(report_text(report))
    return "\n".join(lines)
