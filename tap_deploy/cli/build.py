"""``tap-export build``: compiles the graphs of a bundle to TensorRT or TensorRT-RTX engines."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING, Any

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.update import require_writable
from tap_deploy.console.options import (
    NamedPath,
    bundle_argument,
    force_option,
    json_option,
    option_group,
)
from tap_deploy.console.progress import share_bar
from tap_deploy.graphs import GRAPH_NAMES
from tap_deploy.precisions import PRECISIONS

if TYPE_CHECKING:
    from tap_deploy.engines.build.bundle_build import BuiltPlan, GraphBuild
    from tap_deploy.engines.build.target import BuildTarget

MEGABYTE, GIB = 1e6, 1 << 30


def _target(workspace: str, compute_capability: str | None, **settings: Any) -> BuildTarget:
    from tap_deploy.engines.build.target import (
        BuildTarget,
        bytes_from_text,
        compute_capabilities_from_text,
    )

    if compute_capability is not None:
        settings["compute_capabilities"] = compute_capabilities_from_text(compute_capability)
    return BuildTarget(workspace_bytes=bytes_from_text(workspace), **settings)


target_options = option_group(
    "target",
    _target,
    click.option(
        "--backend",
        type=click.Choice(["tensorrt", "tensorrt_rtx"]),
        default="tensorrt",
        show_default=True,
        help="TensorRT must build on the target GPU; TensorRT-RTX needs no GPU.",
    ),
    click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        default="fp16",
        show_default=True,
        help="Which graphs of the bundle to compile; int8 is Q/DQ over fp16.",
    ),
    click.option(
        "--max-images",
        type=int,
        default=1,
        show_default=True,
        help="Maximum batch of the image encoder.",
    ),
    click.option(
        "--max-prompts",
        type=int,
        default=64,
        show_default=True,
        help="Maximum prompts per call.",
    ),
    click.option(
        "--max-points", type=int, default=16, show_default=True, help="Maximum points per prompt."
    ),
    click.option(
        "--workspace",
        default="1GiB",
        show_default=True,
        metavar="SIZE",
        help="Maximum workspace per layer, e.g. 512MiB.",
    ),
    click.option(
        "--timing-cache",
        type=NamedPath(path_type=pathlib.Path, dir_okay=False),
        help="Timing cache; read if it exists, and extended. TensorRT only.",
    ),
    click.option(
        "--version-compatible",
        is_flag=True,
        help="Build plans that later releases of TensorRT can load. TensorRT only.",
    ),
    click.option(
        "--hardware-compatible",
        type=click.Choice(["ampere+", "same-sm"]),
        help="Build plans that also run on other GPUs. TensorRT only.",
    ),
    click.option(
        "--compute-capability",
        metavar="LIST",
        help="GPUs to build for, e.g. 86,89, or current; default: Ampere and later. "
        "TensorRT-RTX only.",
    ),
    click.option(
        "--opt-level",
        type=click.IntRange(0, 5),
        default=3,
        show_default=True,
        help="Builder optimization level; higher searches longer for fast kernels.",
    ),
    click.option("--tf32", is_flag=True, help="Allow TF32 in fp32 matmuls."),
)


@click.command("build")
@bundle_argument
@target_options
@click.option("--dry-run", is_flag=True, help="Print profiles and memory estimate; build nothing.")
@click.option(
    "--emit",
    type=click.Choice(["trtexec", "polygraphy"]),
    help="Print equivalent trtexec or Polygraphy commands instead of building.",
)
@click.option(
    "--force-memory", is_flag=True, help="Build even if the memory estimate exceeds free memory."
)
@force_option
@json_option
def build_command(
    bundle: str,
    target: BuildTarget,
    dry_run: bool,
    emit: str | None,
    force_memory: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Compile the graphs of BUNDLE to engines, below BUNDLE/engines.

    Keeps existing engines of the same graph, settings, builder version and GPU. On a machine with
    several GPUs, CUDA_VISIBLE_DEVICES chooses.
    """
    opened = Bundle.open(bundle)
    if emit or dry_run:
        click.echo(_without_building(opened, target, emit, as_json))
        return
    require_writable(opened)
    built = build_bundle(opened, target, force=force, force_memory=force_memory)
    for note in (note for plan in built for note in plan.notes):
        click.echo(f"note: {note}", err=True)
    click.echo(json.dumps(_as_json(opened, built), indent=2) if as_json else _as_text(built))


def _without_building(bundle: Bundle, target: BuildTarget, emit: str | None, as_json: bool) -> str:
    from tap_deploy.engines.build.bundle_build import graph_builds
    from tap_deploy.engines.build.emit import tool_command
    from tap_deploy.engines.estimate.memory import available_memory
    from tap_deploy.machine.gpu import local_gpu

    gpu = local_gpu()
    builds = graph_builds(bundle, target, integrated=gpu is not None and gpu.integrated)
    if emit:
        commands = {build.graph: tool_command(emit, build, target) for build in builds}
        return json.dumps(commands, indent=2) if as_json else "\n\n".join(commands.values())
    available = available_memory()
    if as_json:
        values = {"available_memory_bytes": available, "builds": [*map(_planned_json, builds)]}
        return json.dumps(values, indent=2)
    free = "unknown" if available is None else f"{available / GIB:.1f} GiB"
    return "\n".join([*map(_planned_text, builds), f"free memory and swap: {free}"])


def build_bundle(
    bundle: Bundle, target: BuildTarget, *, force: bool = False, force_memory: bool = False
) -> list[BuiltPlan]:
    """Build the engines of a bundle on this machine, with a progress bar; see ``build_engines``.

    Args:
        bundle: the graphs; gets the engines.
        target: backend, precision and settings.
        force: build again what exists.
        force_memory: build even if the memory estimate exceeds free memory.
    """
    from tap_deploy.engines.build.bundle_build import build_engines
    from tap_deploy.engines.estimate.memory import available_memory
    from tap_deploy.machine.gpu import local_gpu

    with share_bar("build") as show:

        def progress(graph: str, share: float, phase: str) -> None:
            whole = (GRAPH_NAMES.index(graph) + share) / len(GRAPH_NAMES)
            show(whole, f"{graph}: {phase}")

        return list(
            build_engines(
                bundle,
                target,
                force=force,
                force_memory=force_memory,
                on_progress=progress,
                find_gpu=local_gpu,
                available_bytes=available_memory,
            )
        )


def _as_json(bundle: Bundle, built: list[BuiltPlan]) -> dict[str, Any]:
    return {
        "bundle": str(bundle.path),
        "engines": [
            json.loads(plan.record.to_json()) | {"path": str(plan.path), "cached": plan.cached}
            for plan in built
        ],
    }


def _as_text(built: list[BuiltPlan]) -> str:
    lines = []
    for plan in built:
        record = plan.record
        how = "kept" if plan.cached else f"built in {record.build_seconds:.1f} s"
        lines.append(f"{plan.graph}: {how}, {record.size_bytes / MEGABYTE:.1f} MB, {plan.path}")
        lines += [
            f"  {name:<22} " + " ".join(f"{b} {'x'.join(map(str, s))}" for b, s in shapes.items())
            for name, shapes in record.profiles.items()
        ]
        if record.layer_precisions is not None:
            counts = ", ".join(f"{n} {p}" for p, n in record.layer_precisions.items())
            lines.append(f"  layers: {counts}")
    return "\n".join(lines)


def _planned_text(build: GraphBuild) -> str:
    lines = [
        f"{build.graph}: {build.weights_bytes / MEGABYTE:.1f} MB of weights, "
        f"about {build.memory_bytes / GIB:.1f} GiB of memory to build"
    ]
    lines += [f"  {name:<22} {shapes}" for name, shapes in build.profile.items()]
    return "\n".join(lines)


def _planned_json(build: GraphBuild) -> dict[str, Any]:
    from tap_deploy.engines.build.profiles import profile_as_json

    return {
        "graph": build.graph,
        "onnx": str(build.onnx_path),
        "weights_bytes": build.weights_bytes,
        "memory_forecast_bytes": build.memory_bytes,
        "profile": profile_as_json(build.profile),
    }
