"""``tap-export inspect``: prints the content of a bundle."""

from __future__ import annotations

import json
import pathlib

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.manifest import Manifest
from tap_deploy.bundle.plans import all_records, plans_passed
from tap_deploy.console.options import FILE, bundle_argument, json_option
from tap_deploy.console.progress import stage_bar
from tap_deploy.graphs import GRAPH_NAMES
from tap_deploy.verify.polygraphy import write_polygraphy

MEGABYTE = 1e6


@click.command("inspect")
@bundle_argument
@click.option(
    "--polygraphy",
    type=FILE,
    metavar="DIR",
    help="Write the golden samples to DIR as inputs and outputs of Polygraphy, and print commands "
    "that use them; print nothing else.",
)
@json_option
def inspect_command(bundle: str, polygraphy: pathlib.Path | None, as_json: bool) -> None:
    """Check BUNDLE; print its graphs, operators and provenance."""
    opened = Bundle.open(bundle)
    if polygraphy is not None:
        click.echo(_polygraphy(opened, polygraphy, as_json))
    else:
        click.echo(_as_json(opened) if as_json else describe(opened))


def _polygraphy(bundle: Bundle, folder: pathlib.Path, as_json: bool) -> str:
    """Write the files for Polygraphy, and return the commands that use them."""
    with stage_bar("polygraphy", len(bundle.manifest.graphs) * len(GRAPH_NAMES)) as stage:
        written = write_polygraphy(bundle, folder, on_graph=stage)
    if not as_json:
        return "\n".join(files.commands() for files in written)
    return json.dumps(
        [
            {
                "variant": files.variant.name,
                "graph": files.graph,
                "folder": str(files.folder),
                "commands": files.commands(),
            }
            for files in written
        ],
        indent=2,
    )


def _as_json(bundle: Bundle) -> str:
    engines = [
        json.loads(record.to_json())
        | {
            "path": path.relative_to(bundle.path).as_posix(),
            "selftest_passed": plans_passed(path.parent),
        }
        for path, record in all_records(bundle)
    ]
    return json.dumps(json.loads(bundle.manifest.to_json()) | {"engines": engines}, indent=2)


def describe(bundle: Bundle) -> str:
    """Return the manifest of a bundle as text."""
    manifest = bundle.manifest
    checkpoint = manifest.checkpoint
    known = f", recognised as {checkpoint.known_as}" if checkpoint.known_as else ""
    lines = [
        f"bundle      {bundle.path}",
        f"model       {manifest.model}",
        f"weights     {checkpoint.file}{known}",
        f"image size  {_image_size(manifest)}",
        f"made by     {', '.join(f'{name} {v}' for name, v in manifest.tools.items())}",
        f"verified    {_verification(bundle)}",
    ]
    for precision, records in manifest.graphs.items():
        for name, record in records.items():
            lines += [
                "",
                f"{name} ({precision}, opset {record.opset}, IR {record.ir_version}, "
                f"{record.num_nodes} nodes, {record.weights_bytes / MEGABYTE:.1f} MB of weights"
                f"{', external data' if record.external_data else ''})",
                *(f"  in   {line}" for line in record.inputs),
                *(f"  out  {line}" for line in record.outputs),
                f"  ops  {', '.join(f'{op} {n}' for op, n in record.op_types.items())}",
            ]
    lines += _verdicts(bundle)
    lines += ["", "files"]
    for file, entry in manifest.files.items():
        lines.append(f"  {entry.size_bytes / MEGABYTE:9.1f} MB  {entry.sha256[:12]}  {file}")
    return "\n".join([*lines, *_engines(bundle)])


def _image_size(manifest: Manifest) -> str:
    size, trained = manifest.config.image_size, manifest.checkpoint.image_size
    interpolated = f", weights for {trained} with interpolated position embeddings"
    return f"{size}{'' if trained is None else interpolated}"


def _verdicts(bundle: Bundle) -> list[str]:
    """Return the verdicts on int8, and the graphs that int8 stands for since."""
    lines: list[str] = []
    for variant, record in bundle.manifest.precisions.items():
        if record.verdict is not None:
            lines.append(f"  {variant}: {record.verdict.sentence}")
        if record.mix:
            mix = ", ".join(f"{graph} {v}" for graph, v in record.mix.items())
            lines.append(f"  {variant}: {mix}")
    return ["", "verdict", *lines] if lines else []


def _engines(bundle: Bundle) -> list[str]:
    """Return the engines by their sidecars, without reading the plans."""
    lines: list[str] = []
    for path, record in all_records(bundle):
        later = " and later" if record.minimum_compute_capability else ""
        verdict = {None: "not tested", True: "tests passed", False: "TESTS FAILED"}
        lines.append(
            f"  {record.size_bytes / MEGABYTE:9.1f} MB  {record.plan_sha256[:12]}  "
            f"{path.relative_to(bundle.path).as_posix()} (SM "
            f"{', '.join(record.compute_capabilities)}{later}, "
            f"{record.build_seconds:.1f} s, {verdict[plans_passed(path.parent)]})"
        )
    return ["", "engines", *lines] if lines else []


def _verification(bundle: Bundle) -> str:
    record = bundle.manifest.verification
    return f"passed, {len(record.checks)} comparisons ({record.backend})"
