"""On the trained demo model, calibration on real pictures passes and on noise fails.

Floors and method are those of the command. The pictures to judge on are of a split that neither the
model nor the calibration has seen, with more than 500 regions.
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
from needs import needs_font

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.cli import main
from tap_deploy.demo_model import DemoModel
from tap_deploy.engines.build.builder import engine_from_onnx
from tap_deploy.engines.build.profiles import optimization_profile
from tap_deploy.engines.build.target import BuildTarget
from tap_deploy.errors import TapError
from tap_deploy.graphs import GRAPH_NAMES
from tap_deploy.predictor import TapPredictor

pytestmark = [
    pytest.mark.slow,
    needs_font,
    pytest.mark.skipif(not DemoModel().weights.is_file(), reason="the demo model has no weights"),
]

KINDS = ("real", "random", "one")
REGIONS = 500
# What every candidate is compared in, besides its answers; see ``Agreement.sqnr_db``.
TENSORS = ("image_embeddings", "low_res_masks", "semantic_tokens", "semantic_embeddings")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Pictures to calibrate on, three ways, and pictures to judge on."""
    from tap_deploy.training.scenes.scene_pictures import write_pictures
    from tap_deploy.training.scenes.scenes import SceneGenerator

    folder = tmp_path_factory.mktemp("calibration")
    for name, split, count in (("real", "validation", 100), ("judge", "test", 160)):
        generator = SceneGenerator(split)
        regions = write_pictures(map(generator.scene, range(count)), folder / name)
    assert regions >= REGIONS
    rng = np.random.default_rng(0)
    (folder / "random").mkdir()
    for index in range(12):
        noise = rng.integers(0, 256, (256, 256, 3), np.uint8)
        Image.fromarray(noise).save(folder / "random" / f"{index}.png")
    (folder / "one").mkdir()
    shutil.copy(folder / "real/validation-0.png", folder / "one")
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: pathlib.Path) -> dict[str, tuple[int, dict[str, Any]]]:
    """Kind of calibration -> exit code and verdict; the bundles lie below ``bundles/``."""
    demo = DemoModel()
    command = ["export", "--config", demo.config, "--checkpoint", demo.weights, "-o"]
    command += [folder / "demo", "--concepts", demo.concepts, "--tokenizer", demo.tokenizer]
    command += ["--precision", "fp16"]
    result = CliRunner().invoke(main, [str(part) for part in command])
    assert result.exit_code == 0, result.stderr
    found = {}
    for kind in KINDS:
        bundle = folder / "bundles" / kind
        shutil.copytree(folder / "demo", bundle)
        command = ["quantize", bundle, "--calibration-data", folder / kind, "--no-speed", "--json"]
        command += ["--prompts", folder / "judge/prompts.json", "--evaluation-data"]
        command += [folder / "judge", "--evaluation-samples", 160, "--threads", 1]
        result = CliRunner().invoke(main, [str(part) for part in command])
        assert result.exit_code in (0, 1), result.stderr
        found[kind] = result.exit_code, json.loads(result.stdout)["verdict"]
    return found


def everything(outcome: tuple[int, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = outcome[1]["whole"]["everything_int8"]
    assert found["regions"] >= REGIONS
    return found


def test_real_pictures_pass(folder, outcomes):
    code, report = outcomes["real"]
    assert code == 0, report["sentence"]
    assert all(graph["use_int8"] for graph in report["graphs"].values())
    manifest = Bundle.open(folder / "bundles/real").manifest
    assert manifest.precisions["int8_fp32"].verdict.passed is True


@pytest.mark.parametrize("graph", GRAPH_NAMES)
def test_an_nvidia_builder_compiles_what_passed(folder, outcomes, graph):
    """All three graphs, as used for engines: Q/DQ over fp16. It needs no GPU."""
    pytest.importorskip("tensorrt_rtx")
    bundle = Bundle.open(folder / "bundles/real")
    target = BuildTarget(backend="tensorrt_rtx", precision="int8", compute_capabilities=("8.6",))
    spec = bundle.variant("int8").specs[graph]
    profile = optimization_profile(spec, target, bundle.config)
    assert engine_from_onnx(bundle.variant("int8").path(graph), target, profile=profile).plan


def test_noise_fails_closed(folder, outcomes):
    code, report = outcomes["random"]
    assert code == 1 and report["passed"] is False and report["failures"]
    path = folder / "bundles/random"
    assert Bundle.open(path).manifest.precisions["int8_fp32"].verdict.passed is False
    page = (path / "reports/verdict-int8_fp32.html").read_text("utf-8")
    assert 'class="verdict failed"' in page
    # It cannot be run by accident. The message names the requested precision, not the variant.
    message = r"precision int8 failed its accuracy check;.* allow_failed=True \(--allow-failed\)"
    with pytest.raises(TapError, match=message):
        TapPredictor.from_bundle(path, precision="int8")


def test_noise_changes_more_of_everything_that_is_reported(outcomes):
    real, random = everything(outcomes["real"]), everything(outcomes["random"])
    for measure in ("mask_iou", "concept_top1"):
        assert random[measure] < real[measure]
    assert random["captions"]["identical"] < real["captions"]["identical"]
    for tensor in TENSORS:  # twice the amplitude of the noise and more
        assert random["sqnr_db"][tensor] < real["sqnr_db"][tensor] - 6


def test_one_picture_fails_closed_and_is_visibly_worse_than_many(outcomes):
    """It is of the right kind, so answers may still pass; the report shows more noise in all of it,
    on average a quarter more and more. Mask logits are left out: single ones that flip decide.
    """
    code, report = outcomes["one"]
    assert code == 1 and "calibration pictures: 1" in report["failures"][0]
    real, one, random = (
        everything(outcomes[kind])["sqnr_db"] for kind in ("real", "one", "random")
    )
    tensors = ("image_embeddings", "semantic_tokens", "semantic_embeddings")
    lost = [real[tensor] - one[tensor] for tensor in tensors]
    assert min(lost) > 0.5 and np.mean(lost) > 1
    assert all(random[tensor] < one[tensor] - 1 for tensor in tensors)
    assert outcomes["one"][1]["made"]["calibration"]["num_samples"] == 1
