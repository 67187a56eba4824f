"""``tap-export plan``: estimates time and memory of a model on a device."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.config import VARIANTS, TapConfig
from tap_deploy.console.config_file import config_from_file
from tap_deploy.console.options import NamedPath, json_option, option_group
from tap_deploy.errors import InputError
from tap_deploy.precisions import FP16, FP32, INT8, PRECISIONS

if TYPE_CHECKING:
    from tap_deploy.engines.estimate.estimate import DeviceEstimate, EstimateOptions
    from tap_deploy.engines.estimate.memory import MemoryEstimate
    from tap_deploy.engines.estimate.roofline import StageEstimate

MEBIBYTE = 1 << 20
GIBIBYTE = 1 << 30
POSITIVE = click.IntRange(min=1)


def _estimate_options(workspace: str, **values: Any) -> EstimateOptions:
    from tap_deploy.engines.build.target import bytes_from_text
    from tap_deploy.engines.estimate.estimate import EstimateOptions

    return EstimateOptions(workspace_bytes=bytes_from_text(workspace), **values)


estimate_options = option_group(
    "options",
    _estimate_options,
    click.option(
        "--precision",
        default=FP16,
        show_default=True,
        type=click.Choice(PRECISIONS),
        help="Precision of the engines, which need not exist.",
    ),
    click.option(
        "--prompts", type=POSITIVE, default=16, show_default=True, help="Regions per picture."
    ),
    click.option(
        "--points", type=POSITIVE, default=2, show_default=True, help="Points per prompt."
    ),
    click.option("--tokens", type=POSITIVE, help="Length of a caption; default: the longest."),
    click.option(
        "--max-prompts",
        type=POSITIVE,
        default=64,
        show_default=True,
        help="Maximum prompts per call of the engines.",
    ),
    click.option(
        "--max-points",
        type=POSITIVE,
        default=16,
        show_default=True,
        help="Maximum points per prompt of the engines.",
    ),
    click.option(
        "--workspace",
        default="1GiB",
        show_default=True,
        metavar="SIZE",
        help="Maximum workspace per layer, e.g. 512MiB.",
    ),
)


@click.command("plan")
@click.argument("bundle", type=NamedPath(), required=False)
@click.option(
    "--model",
    metavar="NAME|FILE",
    help=f"Model instead of a bundle: {', '.join(VARIANTS)}, or a JSON file with the fields of "
    "TapConfig.",
)
@click.option(
    "--device", required=True, help="orin-nano, orin-nx, agx-orin, thor, h100, rtx4090, …"
)
@estimate_options
@json_option
def plan_command(
    bundle: str | None, model: str | None, device: str, options: EstimateOptions, as_json: bool
) -> None:
    """Estimate time and memory of a model on a device.

    Uses the sizes of the model and the peaks of the device. Nothing is exported, built or run; the
    assumptions are printed with the estimate. INT8 is assumed for every layer with stored weights;
    for a BUNDLE with INT8 graphs, for the layers that they quantize.
    """
    from tap_deploy.engines.estimate.devices import device_profile
    from tap_deploy.engines.estimate.estimate import estimate_for_device

    profile = device_profile(device)
    name, config, quantized = _model_of(bundle, model)
    estimate = estimate_for_device(name, config, profile, options, quantized)
    click.echo(json.dumps(estimate.to_dict(), indent=2) if as_json else describe(estimate))


def _model_of(
    bundle: str | None, model: str | None
) -> tuple[str, TapConfig, Mapping[str, Collection[str]] | None]:
    """Return name, sizes, and the quantized nodes of a bundle with INT8."""
    from tap_deploy.engines.estimate.estimate import quantized_nodes

    if bundle is not None and model is None:
        manifest = Bundle.open(bundle).manifest
        return manifest.model, manifest.config, quantized_nodes(manifest)
    if model is None or bundle is not None:
        raise InputError("pass either a bundle or --model, to say which model it is")
    if model in VARIANTS:
        return model, VARIANTS[model], None
    path = pathlib.Path(model)
    if not path.is_file():
        raise InputError(
            f"--model {model!r} is neither one of {', '.join(VARIANTS)} nor a file; pass one of "
            "these, or a JSON file with the fields of TapConfig"
        )
    return path.stem, config_from_file(path), None


_REMEDIES = {
    "build": "add swap, reduce --workspace or --max-prompts, or build on a larger board with the "
    "same GPU",
    "run": "reduce --max-prompts",
}


def describe(estimate: DeviceEstimate) -> str:
    """Return an estimate as text."""
    from tap_deploy.engines.estimate.roofline import FACTORS

    device, precision = estimate.device, estimate.options.precision
    shared = "shared by CPU and GPU" if device.memory_is_shared else "on the card"
    lines = [
        f"ESTIMATE for {estimate.model} in {precision} on {device.title}; nothing was measured",
        "",
        f"device   SM {device.compute_capability}, {device.fp16_tflops:g} FP16 TFLOPS and "
        f"{device.int8_tops:g} INT8 TOPS dense, {device.gigabytes_per_second:g} GB/s, "
        f"{device.memory_bytes / GIBIBYTE:.0f} GiB {shared}",
        f"         ({device.source})",
        "work     computed from the model's dimensions" + _mix(estimate),
        "",
        f"{'stage':34}{'GFLOP':>9}{'MB moved':>10}{'roofline ms':>13}{'expected ms':>18}"
        "  limited by",
        *map(_stage_line, estimate.stages),
        f"{'end to end':53}{estimate.roofline_ms:13.2f}{_range(*estimate.expected_ms):>18}",
        "",
        "engines  "
        + ", ".join(f"{n} {size / MEBIBYTE:.0f} MiB" for n, size in estimate.engine_bytes.items()),
        *_memory_lines("build", estimate.build),
        *_memory_lines("run", estimate.run),
        "",
        "The roofline assumes the stated peak FLOPS and bandwidth. The expected range spans the",
        "best published implementations to typical ones:",
        *(f"  {f.value:g} {f.unit}: {f.source}" for f in FACTORS.values()),
        *(
            ["fp32: matmuls in TF32, as built with --tf32; without it they are far slower"]
            * (precision == FP32)
        ),
        "To measure: tap-export bench BUNDLE --backend tensorrt",
    ]
    return "\n".join(lines)


def _mix(estimate: DeviceEstimate) -> str:
    if estimate.options.precision != INT8:
        return ""
    covered = (
        "the quantized layers of the bundle" if estimate.mix_of_bundle else "every stored weight"
    )
    return f"; INT8 covers {covered}"


def _stage_line(stage: StageEstimate) -> str:
    expected = _range(stage.expected_low_ms, stage.expected_high_ms)
    return (
        f"{stage.stage:34}{stage.gflop:9.1f}{stage.megabytes:10.0f}{stage.roofline_ms:13.2f}"
        f"{expected:>18}  {stage.limited_by}"
    )


def _range(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g}"


def _memory_lines(what: str, memory: MemoryEstimate) -> list[str]:
    verdict = "fits" if memory.fits else f"DOES NOT FIT; {_REMEDIES[what]}"
    head = (
        f"DRAM to {what}: {memory.total_bytes / GIBIBYTE:.2f} of "
        f"{memory.available_bytes / GIBIBYTE:.0f} GiB, {verdict}"
    )
    items = (f"  {size / MEBIBYTE:8.0f} MiB  {name}" for name, size in memory.items.items())
    return ["", head, *items]
