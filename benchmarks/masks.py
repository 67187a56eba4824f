"""Benchmarks full-size masks against two dense matrix products per region, interleaved.

python -m benchmarks.masks [--regions 47] [--size 1920x1080] [--json FILE]
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import json
import os
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import click
import numpy as np

from tap_deploy.console.exits import CleanExits
from tap_deploy.image import Frame
from tap_deploy.machine.cpu import cpu_name, usable_cpus
from tap_deploy.machine.host import Host
from tap_deploy.masks import masks_from_logits, rle_from_mask, rles_from_logits
from tap_deploy.storage.files import atomic_file
from tap_deploy.timing import MIN_ITERATIONS, Latency, measure

DENSE, MASKS, RLES, THREADED = "dense", "masks", "rle", "masks, all threads"
LOGITS, IMAGE_SIZE = 256, 1024


@click.command(cls=CleanExits)
@click.option("--regions", type=click.IntRange(1), default=47, show_default=True)
@click.option("--size", default="1920x1080", show_default=True, metavar="WIDTHxHEIGHT")
@click.option("--iterations", type=click.IntRange(1), default=MIN_ITERATIONS, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=pathlib.Path))
def main(regions: int, size: str, iterations: int, json_path: pathlib.Path | None) -> None:
    """Time masks of blobs of 1 to 15 % of the picture, and of the whole picture."""
    width, height = (int(side) for side in size.split("x"))
    frame = Frame.for_image(height, width, IMAGE_SIZE)
    rows = []
    click.echo(header())
    for name, logits in cases(regions, frame).items():
        check(logits, frame)
        result = measure(candidates(logits, frame), min_iterations=iterations)
        rows.append({"masks": name} | {n: dataclasses.asdict(r) for n, r in result.items()})
        click.echo(table_row(name, result))
    report = {"conditions": conditions(regions, size), "masks": rows}
    click.echo(json.dumps(report["conditions"]))
    if json_path is not None:
        with atomic_file(json_path) as partial:
            partial.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def cases(regions: int, frame: Frame) -> dict[str, np.ndarray]:
    """Return logits float32 [P, S, S] of typical and of full-size masks, by name."""
    rng = np.random.default_rng(0)
    whole = rng.normal(5, 1, (regions, LOGITS, LOGITS)).astype(np.float32)
    return {"blobs of 1 to 15 %": blobs(regions, frame, rng), "whole picture": whole}


def blobs(count: int, frame: Frame, rng: np.random.Generator) -> np.ndarray:
    """Return logits float32 [count, S, S] of uneven ovals of 1 to 15 % of the picture."""
    height, width = (n * LOGITS / IMAGE_SIZE for n in (frame.scaled_height, frame.scaled_width))
    ys, xs = np.mgrid[:LOGITS, :LOGITS].astype(np.float32)
    logits = np.empty((count, LOGITS, LOGITS), np.float32)
    for target in logits:
        area, aspect = rng.uniform(0.01, 0.15) * height * width, rng.uniform(0.5, 2)
        tall, wide = np.sqrt(area / np.pi * aspect), np.sqrt(area / np.pi / aspect)
        y, x = ys - rng.uniform(0, height), xs - rng.uniform(0, width)
        dents = 0.15 * np.sin(5 * np.arctan2(y, x) + rng.uniform(0, 6))
        target[:] = 10 * (1 - np.hypot(y / tall, x / wide) + dents)
    return logits + rng.normal(0, 0.3, logits.shape).astype(np.float32)


def dense_masks(logits: np.ndarray, frame: Frame) -> Callable[[], np.ndarray]:
    """Return a call that computes masks bool [P, H, W] by dense products with resize matrices."""
    rows, columns = matrices(frame, logits.shape[1])

    def call() -> np.ndarray:
        masks = np.empty((len(logits), frame.height, frame.width), np.bool_)
        wide = np.empty((frame.height, frame.width), np.float32)
        for single, mask in zip(logits, masks, strict=True):
            np.matmul(rows @ single, columns.T, out=wide)
            np.greater(wide, 0, out=mask)
        return masks

    return call


def matrices(frame: Frame, size: int) -> list[np.ndarray]:
    """Return matrices [H, size] and [W, size] that resize twice and crop along one axis."""
    enlarge = _bilinear(np.eye(size), frame.image_size)
    axes = (frame.scaled_height, frame.height), (frame.scaled_width, frame.width)
    return [_bilinear(enlarge[:scaled], full).astype(np.float32) for scaled, full in axes]


def _bilinear(signal: np.ndarray, size: int) -> np.ndarray:
    """Resize the first axis bilinearly: half-pixel centres, clamped edges, no antialiasing."""
    last = len(signal) - 1
    centres = ((np.arange(size) + 0.5) * (len(signal) / size) - 0.5).clip(0, last)
    left = np.floor(centres).astype(np.intp)
    weight = (centres - left)[:, None]
    resized: np.ndarray = signal[left] * (1 - weight)
    return resized + signal[np.minimum(left + 1, last)] * weight


def check(logits: np.ndarray, frame: Frame) -> None:
    """Check that all candidates give the same masks; BLAS may round logits near 0 differently."""
    masks = masks_from_logits(logits, frame)
    assert (masks != dense_masks(logits, frame)()).mean() < 1e-6
    assert rles_from_logits(logits, frame) == [rle_from_mask(mask) for mask in masks]


def candidates(logits: np.ndarray, frame: Frame) -> dict[str, Callable[[], object]]:
    """Return the calls to time; the last one uses a thread per CPU, one region per task."""
    pool = concurrent.futures.ThreadPoolExecutor(usable_cpus())
    return {
        DENSE: dense_masks(logits, frame),
        MASKS: lambda: masks_from_logits(logits, frame),
        RLES: lambda: rles_from_logits(logits, frame),
        THREADED: lambda: list(
            pool.map(lambda one: masks_from_logits(one, frame), logits[:, None])
        ),
    }


def header() -> str:
    """Return the header of the Markdown table."""
    columns = ("masks", f"{DENSE}, median ms (cv)", *(f"{n} (ratio)" for n in (MASKS, RLES)))
    return f"| {' | '.join((*columns, f'{THREADED} (ratio)'))} |\n|{'---|' * 5}"


def table_row(name: str, result: dict[str, Latency]) -> str:
    """Return one Markdown row: medians, variation, and the speed-up over dense products."""
    dense = result[DENSE]
    cells = [f"{dense.median_ms:.1f} ({100 * dense.cv:.1f} %)"]
    for kind in (MASKS, RLES, THREADED):
        cells.append(
            f"{result[kind].median_ms:.1f} ({dense.median_ms / result[kind].median_ms:.1f})"
        )
    return f"| {name} | {' | '.join(cells)} |"


def conditions(regions: int, size: str) -> dict[str, Any]:
    """Return the conditions of the measurement."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(Host()),
        "cpus": usable_cpus(),
        "load": os.getloadavg()[0],
        "regions": regions,
        "size": size,
        "logits": LOGITS,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


if __name__ == "__main__":
    main()
