"""``tap-export convert``: adds another precision to a bundle."""

from __future__ import annotations

import collections
import json
import pathlib
from typing import TYPE_CHECKING

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.json_record import record_to_json
from tap_deploy.bundle.update import require_writable
from tap_deploy.console.extras import require_quantize_extra
from tap_deploy.console.options import (
    bundle_argument,
    force_option,
    json_option,
    samples_option,
    strict_option,
    threads_option,
)
from tap_deploy.console.progress import stage_bar
from tap_deploy.errors import InputError
from tap_deploy.precisions import FP16, INT8, PRECISIONS

if TYPE_CHECKING:
    from tap_deploy.engines.fp16.convert import Fp16Graphs


@click.command("convert")
@bundle_argument
@click.option("--precision", required=True, type=click.Choice(PRECISIONS), help="Precision to add.")
@samples_option
@strict_option
@threads_option
@force_option
@json_option
def convert_command(
    bundle: str,
    precision: str,
    samples: tuple[pathlib.Path, ...],
    strict: bool,
    threads: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Add the graphs of another precision to BUNDLE.

    They are verified on its golden samples.

    fp16: strongly typed graphs for engines. Nodes whose values come near the fp16 limit on the
    samples stay fp32; the manifest lists them.
    """
    require_convertible(precision)
    opened = Bundle.open(bundle)
    require_writable(opened)
    converted = convert_bundle(opened, samples, strict=strict, threads=threads, force=force)
    click.echo(_as_json(opened, converted) if as_json else describe_fp16(converted))


def require_convertible(precision: str) -> None:
    """Check that ``convert_bundle`` makes a precision.

    Raises:
        InputError: another command makes it, or every bundle has it.
    """
    if precision == INT8:
        raise InputError(
            "int8 needs real pictures to calibrate with; make it with: "
            "tap-export quantize BUNDLE --calibration-data DIR"
        )
    if precision != FP16:
        raise InputError(f"every bundle has {precision} already; expected --precision {FP16}")


def convert_bundle(
    bundle: Bundle,
    samples: tuple[pathlib.Path, ...],
    *,
    strict: bool = False,
    threads: int | None = None,
    force: bool = False,
) -> Fp16Graphs:
    """Add fp16 to a bundle, with a progress bar; see ``engines.fp16.convert.add_fp16``."""
    require_quantize_extra()
    from tap_deploy.engines.fp16.convert import add_fp16, num_stages

    with stage_bar("convert to fp16", num_stages(samples)) as stage:
        return add_fp16(
            bundle,
            pictures=samples,
            strict=strict,
            threads=threads,
            force=force,
            on_stage=stage,
        )


def describe_fp16(converted: Fp16Graphs) -> str:
    """Return what was made as text."""
    lines = []
    for name, islands in converted.islands.items():
        counts = collections.Counter(island.reason.value for island in islands.values())
        listed = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        largest = converted.record.fp16_graphs[name].largest_fp16_activation
        lines += [
            f"{name}: {len(islands)} nodes stay fp32 ({listed})",
            f"  largest value kept in fp16: {largest.max_abs:.4g} ({largest.tensor})",
        ]
    return "\n".join([*lines, "", str(converted.report)])


def _as_json(bundle: Bundle, converted: Fp16Graphs) -> str:
    manifest = json.loads(bundle.manifest.to_json())
    result = {
        "bundle": str(bundle.path),
        "precision": FP16,
        "graphs": manifest["graphs"][FP16],
        "precisions": {FP16: record_to_json(converted.record)},
    }
    return json.dumps(result, indent=2)
