"""The runtime on onnxruntime beside the PyTorch reference, stage by stage, on a CPU.

python -m benchmarks.cpu BUNDLE [--threads 2] [--json FILE]
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import torch

from tap_deploy import graphs
from tap_deploy.bundle import Bundle
from tap_deploy.captioner import Captioner
from tap_deploy.cli.exits import CleanExits
from tap_deploy.files import atomic_file
from tap_deploy.machine.cpu import cpu_name, usable_cores
from tap_deploy.machine.host import Host
from tap_deploy.masks import request_answers
from tap_deploy.optional_modules import version_of
from tap_deploy.reference.checkpoint import load_checkpoint
from tap_deploy.reference.model import TapModel
from tap_deploy.reference.synthetic import synthetic_model
from tap_deploy.sessions import sessions_from_bundle
from tap_deploy.timing import MIN_ITERATIONS, Latency, measure

OURS, BASELINE = "onnxruntime fp32", "PyTorch eager fp32"
PROMPTS = (1, 16, 64)


@click.command(cls=CleanExits)
@click.argument("bundle", type=click.Path(path_type=pathlib.Path))
@click.option("--checkpoint", type=click.Path(path_type=pathlib.Path), help="Default: synthetic.")
@click.option("--threads", type=int, default=usable_cores(), show_default=True)
@click.option("--iterations", type=int, default=MIN_ITERATIONS, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=pathlib.Path))
def main(
    bundle: pathlib.Path,
    checkpoint: pathlib.Path | None,
    threads: int,
    iterations: int,
    json_path: pathlib.Path | None,
) -> None:
    """Time encoder, prompt decoder and captions, ours and PyTorch's, in turns."""
    torch.set_num_threads(threads)
    opened = Bundle.open(bundle)
    if checkpoint is None:
        model = synthetic_model(opened.config, 0)
    else:
        model, _ = load_checkpoint(checkpoint, opened.config)
    rows = []
    click.echo(header())
    for stage, candidates in stages(opened, model, threads):
        with torch.inference_mode():
            result = measure(candidates, min_iterations=iterations)
        rows.append({"stage": stage} | {n: dataclasses.asdict(r) for n, r in result.items()})
        click.echo(table_row(stage, result))
    report = {"conditions": conditions(opened, threads), "stages": rows}
    click.echo(json.dumps(report["conditions"]))
    if json_path is not None:
        with atomic_file(json_path) as partial:
            partial.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def stages(
    bundle: Bundle, model: TapModel, threads: int
) -> list[tuple[str, dict[str, Callable[[], object]]]]:
    """Return the name and the two candidates of every stage; inputs are made beforehand."""
    sessions = sessions_from_bundle(bundle, "onnxruntime", "fp32", threads=threads)
    config, rng = bundle.config, np.random.default_rng(0)
    size, grid, channels = config.image_size, config.grid_size, config.image_embed_dim
    images = rng.integers(0, 256, (1, size, size, 3), np.uint8)
    embeddings = rng.standard_normal((1, channels, grid, grid)).astype(np.float32)
    captioner = Captioner(sessions[graphs.TEXT_DECODER], config)

    def encode() -> tuple[str, dict[str, Callable[[], object]]]:
        feed = {graphs.IMAGES: images}
        ours = sessions[graphs.IMAGE_ENCODER]
        tensor = torch.from_numpy(images)
        return "encode 1 image", {
            OURS: lambda: ours.run(feed),
            BASELINE: lambda: model.encode_image(tensor),
        }

    def decode(count: int) -> tuple[str, dict[str, Callable[[], object]]]:
        coords = rng.uniform(0, size, (count, 2, 2)).astype(np.float32)
        labels = np.ones((count, 2), np.int32)
        feed = dict(
            zip(
                (graphs.IMAGE_EMBEDDINGS, graphs.POINT_COORDS, graphs.POINT_LABELS),
                (embeddings, coords, labels),
                strict=True,
            )
        )
        tensors = [torch.from_numpy(array) for array in feed.values()]
        feed[graphs.MASK_REQUEST] = request_answers(count)
        return f"decode P={count} prompts", {
            OURS: lambda: sessions[graphs.PROMPT_DECODER].run(feed),
            BASELINE: lambda: model.decode_prompts(*tensors),
        }

    def caption(count: int) -> tuple[str, dict[str, Callable[[], object]]]:
        tokens = rng.standard_normal((count, channels)).astype(np.float32)
        tensor = torch.from_numpy(tokens)
        steps = config.max_new_tokens
        return f"caption P={count}, {steps} tokens", {
            OURS: lambda: captioner.generate(tokens),
            BASELINE: lambda: model.generate(tensor),
        }

    return [encode(), *map(decode, PROMPTS), *map(caption, PROMPTS)]


def header() -> str:
    """Return the head of the Markdown table."""
    columns = ("stage", f"{OURS}, median ms (cv)", f"{BASELINE}, median ms (cv)", "ratio")
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def table_row(stage: str, result: dict[str, Latency]) -> str:
    """Return one Markdown row: medians, noise, and how many times faster ours is."""
    ours, baseline = result[OURS], result[BASELINE]
    cells = [f"{r.median_ms:.1f} ({100 * r.cv:.1f} %)" for r in (ours, baseline)]
    return f"| {stage} | {' | '.join(cells)} | {baseline.median_ms / ours.median_ms:.2f} |"


def conditions(bundle: Bundle, threads: int) -> dict[str, Any]:
    """Return what the figures depend on."""
    packages = ("torch", "onnxruntime", "numpy")
    return {
        "model": bundle.manifest.model,
        "weights": bundle.manifest.checkpoint.file,
        "cpu": cpu_name(Host()),
        "threads": threads,
        "python": platform.python_version(),
        **{name: version_of(name) for name in packages},
    }


if __name__ == "__main__":
    main()
