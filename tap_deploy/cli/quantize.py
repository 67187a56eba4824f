"""``tap-export quantize``: int8 graphs for a bundle, calibrated on real pictures."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING, Any

import click

from tap_deploy.bundle import Bundle
from tap_deploy.cli.extras import require_quantize_extra
from tap_deploy.cli.options import bundle_argument, force_option, json_option, threads_option
from tap_deploy.cli.progress import stage_bar
from tap_deploy.precisions import CALIBRATION_METHODS, FP32

if TYPE_CHECKING:
    from tap_deploy.engines.quantize import QuantizeOptions

FILE = click.Path(path_type=pathlib.Path)
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
    default="entropy",
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
    threads: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Calibrate BUNDLE on real pictures and add its int8 graphs.

    For a CPU over the fp32 graphs; for engines over the fp16 graphs, if the bundle has any.
    """
    require_quantize_extra()
    from tap_deploy.engines.quantize import QuantizeOptions

    options = QuantizeOptions(
        calibration_data=calibration_data,
        prompts_file=prompts,
        method=method,
        samples=samples,
        cache=cache,
        force=force,
        seed=seed,
        threads=threads,
    )
    summary = add_int8(Bundle.open(bundle), options)
    click.echo(json.dumps(summary, indent=2) if as_json else describe_int8(summary))


def add_int8(bundle: Bundle, options: QuantizeOptions) -> dict[str, Any]:
    """Quantize a bundle with a progress bar; see ``tap_deploy.engines.quantize``.

    Returns:
        what was added, JSON types: bundle, calibration, graphs by variant and name.
    """
    from tap_deploy.engines.quantize import quantize_bundle

    images = options.images()
    with stage_bar("calibrate", len(images) + 1) as stage:
        quantize_bundle(
            bundle,
            options,
            images=images,
            on_progress=lambda done, total: stage(f"picture {min(done + 1, total)} of {total}"),
            on_warning=lambda text: click.echo(f"warning: {text}", err=True),
        )
    return _summary(bundle)


def _summary(bundle: Bundle) -> dict[str, Any]:
    """What was added, per variant and graph."""
    manifest = bundle.manifest
    graphs = {
        variant: {
            name: {
                "file": record.file,
                "quantized_nodes": len(known["graphs"][name]["quantized_nodes"]),
                "weights_bytes": record.weights_bytes,
                "fp32_weights_bytes": manifest.graphs[FP32][name].weights_bytes,
            }
            for name, record in manifest.graphs[variant].items()
        }
        for variant, known in manifest.precisions.items()
        if "calibration" in known
    }
    calibration = next(
        known["calibration"] for known in map(manifest.precisions.get, graphs) if known
    )
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
    return "\n".join(lines)
