"""Prepares bundles on a CPU: micro complete, the published model without its weights."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.context import MICRO, VIT_B, write_json
from benchmarks.gpu.micro import SEED, make_micro
from benchmarks.gpu.strip import strip_bundle, update_manifest
from benchmarks.gpu.weights import Recipes
from tap_deploy import __version__
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.manifest import MANIFEST_NAME, CheckpointRecord
from tap_deploy.config import VARIANTS
from tap_deploy.precisions import INT8_FP32

PREPARED_FILE = "prepared.json"
DATA = pathlib.Path(__file__).resolve().parents[2] / "tests" / "data"
Say = Callable[[str], None]


def prepare(output: pathlib.Path, say: Say) -> dict[str, Any]:
    """Make the folder for ``scripts/test-gpu --bundle``; return its description.

    The graphs of the published size are stored without weights.

    Args:
        output: the folder to write; bundles of an earlier call are replaced.
        say: called with a text before each stage.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name in (MICRO, VIT_B):
        shutil.rmtree(output / name, ignore_errors=True)
    say(f"{MICRO}: export, fp16, int8")
    make_micro(DATA, output / MICRO)
    with tempfile.TemporaryDirectory(dir=output) as work:
        bundle = make_vit_b(pathlib.Path(work, VIT_B), say)
        say(f"{VIT_B}: strip the weights")
        recipes = Recipes(bundle.config)
        sizes = strip_bundle(bundle.path, output / VIT_B, recipes)
    found = {
        "tap_deploy": __version__,
        "model": VIT_B,
        "weights_bytes": sizes,
        "size_bytes": {name: folder_bytes(output / name) for name in (MICRO, VIT_B)},
    }
    write_json(output / PREPARED_FILE, found)
    return found


def make_vit_b(output: pathlib.Path, say: Say) -> Bundle:
    """Export the published size with synthetic weights, fp16 and int8; drop unneeded files."""
    from tap_deploy.engines.fp16.convert import add_fp16
    from tap_deploy.engines.int8.make import make_int8
    from tap_deploy.engines.int8.options import Int8Options, QuantizeOptions
    from tap_deploy.engines.smoothing.smoothed_variant import OFF
    from tap_deploy.export.bundle_export import export_bundle
    from tap_deploy.reference.synthetic import synthetic_model

    name = f"synthetic, seed {SEED}"
    record = CheckpointRecord(
        file=name,
        sha256=hashlib.sha256(name.encode()).hexdigest(),
        md5="0" * 32,
        known_as=None,
        synthetic=True,
    )
    say(f"{VIT_B}: export")
    export_bundle(synthetic_model(VARIANTS[VIT_B], SEED), output, name=VIT_B, checkpoint=record)
    say(f"{VIT_B}: fp16")
    add_fp16(Bundle.open(output))
    say(f"{VIT_B}: int8")
    options = Int8Options(
        quantize=QuantizeOptions(calibration_data=DATA / "coffee.jpg", samples=1),
        smoothquant=OFF,
        verdict=None,
    )
    make_int8(Bundle.open(output), options)
    _drop_what_latency_needs_not(output)
    return Bundle.open(output)


def _drop_what_latency_needs_not(bundle: pathlib.Path) -> None:
    """Remove golden samples, which do not fit restored weights, and CPU graphs."""
    for folder in ("golden", "calibration", f"onnx/{INT8_FP32}"):
        shutil.rmtree(bundle / folder, ignore_errors=True)
    path = bundle / MANIFEST_NAME
    values = json.loads(path.read_text("utf-8"))
    for part in ("graphs", "precisions"):
        values[part].pop(INT8_FP32, None)
    write_json(path, values)
    update_manifest(bundle)


def folder_bytes(folder: pathlib.Path) -> int:
    """Return the total size of the files in a folder, bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
