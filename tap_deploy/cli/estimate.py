"""``tap-export plan``: what a bundle will take on a device, before it is built there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from tap_deploy.bundle import Bundle
from tap_deploy.cli.extras import require_quantize_extra
from tap_deploy.cli.options import bundle_argument, json_option
from tap_deploy.precisions import FP16, FP32, PRECISIONS

if TYPE_CHECKING:
    from tap_deploy.engines.dram import DramBudget
    from tap_deploy.engines.estimate import DevicePlan
    from tap_deploy.engines.roofline import StageEstimate

MEBIBYTE = 1 << 20
GIBIBYTE = 1 << 30
POSITIVE = click.IntRange(min=1)


@click.command("plan")
@bundle_argument
@click.option(
    "--device", required=True, help="orin-nano, orin-nx, agx-orin, thor, h100, rtx4090, …"
)
@click.option(
    "--precision",
    default=FP16,
    show_default=True,
    type=click.Choice(PRECISIONS),
    help="Which engines; the bundle need not hold them yet.",
)
@click.option("--prompts", type=POSITIVE, default=16, show_default=True, help="Regions a picture.")
@click.option("--points", type=POSITIVE, default=2, show_default=True, help="Points a prompt.")
@click.option("--tokens", type=POSITIVE, help="Length of a caption; default: the longest.")
@click.option("--max-prompts", type=POSITIVE, default=64, show_default=True, help="As for build.")
@click.option("--max-points", type=POSITIVE, default=16, show_default=True, help="As for build.")
@click.option(
    "--workspace", default="1GiB", show_default=True, metavar="SIZE", help="As for build."
)
@json_option
def plan_command(
    bundle: str,
    device: str,
    precision: str,
    prompts: int,
    points: int,
    tokens: int | None,
    max_prompts: int,
    max_points: int,
    workspace: str,
    as_json: bool,
) -> None:
    """Estimate time and memory of BUNDLE on a device, from its graphs and the device's peaks.

    Nothing is built or run; the figures behind the estimate are shown with it.
    """
    require_quantize_extra()
    from tap_deploy.engines.device_profiles import device_profile
    from tap_deploy.engines.estimate import PlanOptions, plan_for_device
    from tap_deploy.engines.target import bytes_from_text

    profile = device_profile(device)
    options = PlanOptions(
        precision=precision,
        prompts=prompts,
        points=points,
        tokens=tokens,
        max_prompts=max_prompts,
        max_points=max_points,
        workspace_bytes=bytes_from_text(workspace),
    )
    plan = plan_for_device(Bundle.open(bundle), profile, options)
    click.echo(json.dumps(plan.to_dict(), indent=2) if as_json else describe(plan))


def describe(plan: DevicePlan) -> str:
    """Return a plan for people to read."""
    from tap_deploy.engines.roofline import FACTORS

    device, low_high, is_fp32 = plan.device, plan.expected_ms, plan.options.precision == FP32
    shared = "shared by CPU and GPU" if device.memory_is_shared else "on the card"
    lines = [
        f"ESTIMATE for {plan.model} in {plan.options.precision} on {device.title}; "
        "nothing was measured",
        "",
        f"device   SM {device.compute_capability}, {device.fp16_tflops:g} FP16 TFLOPS and "
        f"{device.int8_tops:g} INT8 TOPS dense, {device.gigabytes_per_second:g} GB/s, "
        f"{device.memory_bytes / GIBIBYTE:.0f} GiB {shared}",
        f"         ({device.source})",
        f"work     counted from the {plan.counted_from} graphs of the bundle",
        "",
        f"{'stage':34}{'GFLOP':>9}{'MB moved':>10}{'roofline ms':>13}{'expected ms':>18}"
        "  limited by",
        *map(_stage_line, plan.stages),
        f"{'end to end':53}{plan.roofline_ms:13.2f}{_range(*low_high):>18}",
        "",
        "engines  "
        + ", ".join(f"{n} {size / MEBIBYTE:.0f} MiB" for n, size in plan.engine_bytes.items()),
        *_budget_lines("build", plan.build),
        *_budget_lines("run", plan.run),
        "",
        "The roofline is the stated peaks of arithmetic and bandwidth. The range goes from the",
        "best published implementations to usual ones:",
        *(f"  {f.value:g} {f.unit}: {f.source}" for f in FACTORS.values()),
        *(
            ["fp32: products in TF32, as built with --tf32; without it they are far slower"]
            * is_fp32
        ),
        "Measure it: python -m benchmarks.engines BUNDLE --backend tensorrt",
    ]
    return "\n".join(lines)


def _stage_line(stage: StageEstimate) -> str:
    expected = _range(stage.expected_low_ms, stage.expected_high_ms)
    return (
        f"{stage.stage:34}{stage.gflop:9.1f}{stage.megabytes:10.0f}{stage.roofline_ms:13.2f}"
        f"{expected:>18}  {stage.limited_by}"
    )


def _range(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g}"


def _budget_lines(what: str, budget: DramBudget) -> list[str]:
    verdict = (
        "fits" if budget.fits else "DOES NOT FIT; add swap, or build for less with --max-prompts"
    )
    head = (
        f"DRAM to {what}: {budget.total_bytes / GIBIBYTE:.2f} of "
        f"{budget.available_bytes / GIBIBYTE:.0f} GiB, {verdict}"
    )
    items = (f"  {size / MEBIBYTE:8.0f} MiB  {name}" for name, size in budget.items.items())
    return ["", head, *items]
