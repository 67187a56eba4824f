"""``tap-export quantize``: int8 graphs for a bundle, calibrated on real pictures."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Any

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.update import require_writable
from tap_deploy.cli.verdict import report_text, require_passed
from tap_deploy.cli.verdict_options import JudgeOptions, eager_runtime, judge_options
from tap_deploy.console.extras import require_quantize_extra
from tap_deploy.console.options import (
    FILE,
    bundle_argument,
    force_option,
    json_option,
    option_group,
    strict_option,
    threads_option,
)
from tap_deploy.console.progress import stage_bar
from tap_deploy.errors import InputError
from tap_deploy.precisions import CALIBRATION_METHODS, DEFAULT_CALIBRATION_METHOD, FP32

if TYPE_CHECKING:
    from tap_deploy.engines.int8.options import Int8Options

CPU = "onnxruntime"
STAGES = 15  # in addition to pictures: writing, judging
calibration_data_option = click.option(
    "--calibration-data",
    type=FILE,
    help="Real pictures for int8 calibration: a folder, a picture, or a list (.txt, .json).",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Choices:
    """How INT8 graphs are made; see ``QuantizeOptions`` and ``Int8Options``.

    Attributes:
        calibration_data: pictures: a folder, a picture, a list of paths.
        prompts_file: JSON with prompts for them; None for random ones.
        method: calibration method.
        samples: maximum number of pictures.
        cache: calibration cache.
        seed: of the random choices.
        attention: also quantize the attention matmuls.
        residuals: also quantize residual additions.
        reduce_range: 7-bit weights.
        smoothquant: ``auto``, ``on`` or ``off``.
        budget: accuracy budget, for example ``miou=0.005``; None for none.
        exclusions: JSON file of blocks that stay float.
        no_verdict: calibrate on all pictures, without a verdict.
    """

    calibration_data: pathlib.Path | None
    prompts_file: pathlib.Path | None
    method: str
    samples: int
    cache: pathlib.Path | None
    seed: int
    attention: bool
    residuals: bool
    reduce_range: bool
    smoothquant: str
    budget: str | None
    exclusions: pathlib.Path | None
    no_verdict: bool

    def options(
        self, judging: JudgeOptions, *, strict: bool, threads: int | None, force: bool
    ) -> Int8Options:
        """Return the options for the quantizer.

        Raises:
            InputError: values are invalid or exclude each other, or a file cannot be read.
            MissingDependencyError: a package is not installed.
        """
        require_quantize_extra()
        if self.no_verdict and (judging.evaluation_data or judging.checkpoint):
            raise InputError(
                "--no-verdict judges nothing; leave it out, or --evaluation-data and --checkpoint"
            )
        from tap_deploy.engines.int8.blocks import Exclusions
        from tap_deploy.engines.int8.budget import AccuracyBudget
        from tap_deploy.engines.int8.options import Int8Options, QuantizeOptions

        verdict = None if self.no_verdict else judging.verdict(backend=CPU, threads=threads)
        return Int8Options(
            quantize=QuantizeOptions(
                calibration_data=self.calibration_data,
                prompts_file=self.prompts_file,
                method=self.method,
                samples=self.samples,
                cache=self.cache,
                force=force,
                seed=self.seed,
                attention=self.attention,
                residuals=self.residuals,
                reduce_range=self.reduce_range,
                threads=threads,
                strict=strict,
            ),
            smoothquant=self.smoothquant,
            budget=None if self.budget is None else AccuracyBudget.parse(self.budget),
            exclusions=None if self.exclusions is None else Exclusions.load(self.exclusions),
            evaluation_data=judging.evaluation_data,
            evaluation_samples=judging.evaluation_samples,
            verdict=verdict,
        )


int8_options = option_group(
    "choices",
    Int8Choices,
    calibration_data_option,
    click.option(
        "--prompts",
        "prompts_file",
        type=FILE,
        help='JSON, {"picture.jpg": {"boxes": […], "points": […], "sketches": […]}}; '
        "default: random prompts.",
    ),
    click.option(
        "--method",
        type=click.Choice(CALIBRATION_METHODS),
        default=DEFAULT_CALIBRATION_METHOD,
        show_default=True,
        help="How the range of a tensor is chosen.",
    ),
    click.option(
        "--samples",
        type=click.IntRange(min=1),
        default=500,
        show_default=True,
        help="Maximum number of pictures.",
    ),
    click.option(
        "--cache", type=FILE, help="Calibration cache; an interrupted calibration resumes from it."
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Seed of the random choices.",
    ),
    click.option(
        "--attention", is_flag=True, help="Also quantize the attention matmuls (QKᵀ and PV)."
    ),
    click.option("--residuals", is_flag=True, help="Also quantize residual additions."),
    click.option(
        "--reduce-range",
        is_flag=True,
        help="7-bit weights: faster on x86 CPUs without VNNI, less accurate everywhere.",
    ),
    click.option(
        "--smoothquant",
        type=click.Choice(["auto", "on", "off"]),
        default="auto",
        show_default=True,
        help="Move activation outliers into the weights. auto: where it measurably helps; on: "
        "everywhere; off: nowhere.",
    ),
    click.option(
        "--budget",
        help="Accuracy budget of INT8, e.g. miou=0.005,top1=0.01,tokens=0.02; blocks that exceed "
        "it stay float.",
    ),
    click.option(
        "--exclusions",
        type=FILE,
        help="JSON with the blocks that stay float, as found by --budget.",
    ),
    click.option(
        "--no-verdict", is_flag=True, help="Calibrate on all pictures, without a verdict."
    ),
)


@click.command("quantize")
@bundle_argument
@int8_options
@judge_options
@strict_option
@threads_option
@force_option
@json_option
def quantize_command(
    bundle: str,
    choices: Int8Choices,
    judging: JudgeOptions,
    strict: bool,
    threads: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Calibrate BUNDLE on real pictures; add and judge int8 graphs.

    Quantizes the fp32 graphs for CPUs, and the fp16 graphs, if there are any, for engines. A fifth
    of the pictures is held out for the verdict, unless --evaluation-data is given. If INT8 fails,
    marks the bundle and exits with 1.
    """
    options = choices.options(judging, strict=strict, threads=threads, force=force)
    opened = Bundle.open(bundle)
    require_writable(opened)
    summary = add_int8(opened, options, checkpoint=judging.checkpoint)
    click.echo(json.dumps(summary, indent=2) if as_json else describe_int8(summary))
    if summary["verdict"]:
        require_passed(summary["verdict"])


def add_int8(
    bundle: Bundle, options: Int8Options, *, checkpoint: pathlib.Path | None = None
) -> dict[str, Any]:
    """Quantize a bundle with a progress bar; see ``tap_deploy.engines.int8.make``.

    Args:
        bundle: the bundle to add the graphs to.
        options: pictures, method and verdict.
        checkpoint: weights, to time PyTorch in the same run.

    Returns:
        What was added, JSON types: bundle, calibration, graphs by variant and name, and the
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
    """Return what was added, per variant and graph."""
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
    """Return what was added as text."""
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
