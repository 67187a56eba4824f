"""On the trained demo model: calibration on real pictures passes, on noise it is caught.

The floors are those of the command; the pictures to judge on are of a split that neither the model
nor the calibration has seen.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")
pytest.importorskip("skimage")
from tap_deploy.bundle import Bundle
from tap_deploy.cli import main
from tap_deploy.demo_model import DemoModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DemoModel().weights.is_file(), reason="the demo model has no weights"),
]

KINDS = ("real", "random", "one")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Pictures to calibrate on, three ways, and pictures to judge on."""
    from tap_deploy.training.scenes import SceneGenerator

    folder = tmp_path_factory.mktemp("calibration")
    for name, split, count in (("real", "validation", 48), ("judge", "test", 16)):
        (folder / name).mkdir()
        scenes = SceneGenerator(split)
        for seed in range(count):
            Image.fromarray(scenes.scene(seed).image).save(folder / name / f"{seed}.png")
    rng = np.random.default_rng(0)
    (folder / "random").mkdir()
    for index in range(12):
        noise = rng.integers(0, 256, (256, 256, 3), np.uint8)
        Image.fromarray(noise).save(folder / "random" / f"{index}.png")
    (folder / "one").mkdir()
    shutil.copy(folder / "real/0.png", folder / "one/0.png")
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: pathlib.Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Kind of calibration -> exit code and verdict; the bundles lie below ``bundles/``."""
    demo = DemoModel()
    command = ["export", "--config", demo.config, "--checkpoint", demo.weights, "-o"]
    command += [folder / "demo", "--concepts", demo.concepts, "--tokenizer", demo.tokenizer]
    result = CliRunner().invoke(main, [str(part) for part in command])
    assert result.exit_code == 0, result.stderr
    found = {}
    for kind in KINDS:
        bundle = folder / "bundles" / kind
        shutil.copytree(folder / "demo", bundle)
        command = ["quantize", bundle, "--calibration-data", folder / kind, "--no-speed", "--json"]
        command += ["--evaluation-data", folder / "judge", "--smoothquant", "off"]
        result = CliRunner().invoke(main, [str(part) for part in command])
        assert result.exit_code in (0, 1), result.stderr
        found[kind] = result.exit_code, json.loads(result.stdout)["verdict"]
    return found


def everything(outcome: tuple[Any, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = outcome[1]["whole"]["everything_int8"]
    return found


def test_noise_fails_closed(folder, outcomes):
    code, report = outcomes["random"]
    assert code == 1 and report["passed"] is False
    assert any(failure.startswith("image_encoder: mean mask IoU") for failure in report["failures"])
    manifest = Bundle.open(folder / "bundles/random").manifest
    assert manifest.precisions["int8_fp32"]["verdict"]["passed"] is False
    page = (folder / "bundles/random/reports/verdict-int8_fp32.html").read_text("utf-8")
    assert 'class="verdict failed"' in page


def test_noise_and_one_picture_are_visibly_worse(outcomes):
    real, one, random = (everything(outcomes[kind]) for kind in ("real", "one", "random"))
    for measure in ("mask_iou", "concept_top1"):
        assert random[measure] < real[measure] - 0.05
    assert random["captions"]["identical"] < real["captions"]["identical"] - 0.1
    # One picture of the right kind is not that far off: its noise shows first, masks last.
    for tensor in ("image_embeddings", "semantic_tokens", "semantic_embeddings"):
        noise = [found["sqnr_db"][tensor] for found in (real, one, random)]
        assert noise[0] > noise[1] + 1 and noise[1] > noise[2] + 6
