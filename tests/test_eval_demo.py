"""``tap-export eval demo``: PyTorch and a bundle, side by side on the same scenes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

from training_standin import Oracle, StandInScenes

from tap_deploy.cli import main
from tap_deploy.demo_model import DemoModel
from tap_deploy.errors import BundleError, InputError, VerificationError


@pytest.fixture
def run(monkeypatch):
    """Run the command on stand-in scenes; returns its output."""
    made = []

    def scenes(split, image_size):
        made.append((split, image_size))
        return StandInScenes()

    monkeypatch.setattr("tap_deploy.training.scenes.scenes.SceneGenerator", scenes)

    def invoke(*args):
        result = CliRunner().invoke(main, ["eval", "demo", *args], standalone_mode=False)
        if result.exception is not None:
            raise result.exception
        assert made == [("test", 512)]
        made.clear()
        return result.output

    return invoke


def test_both_columns_agree(run, micro_bundle, assets):
    output = run(
        str(micro_bundle.path), "--checkpoint", str(assets["checkpoint"]), "--regions", "3"
    )
    lines = output.splitlines()
    assert lines[0].split() == ["prompt", "PyTorch", "onnxruntime", "fp32"]
    rows = [line.split() for line in lines[1:-1]]
    assert len(rows) == 12
    for measure, prompt, pytorch, bundle in rows:
        assert float(pytorch) == pytest.approx(float(bundle), abs=0.002), (measure, prompt)
    assert lines[-1].startswith("3 regions")


def test_json_of_a_bundle_alone(run, micro_bundle):
    scores = json.loads(run(str(micro_bundle.path), "--regions", "2", "--json"))
    assert list(scores) == ["onnxruntime fp32"]
    assert scores["onnxruntime fp32"]["regions"] == 2
    assert 0 <= scores["onnxruntime fp32"]["point"]["mask_iou"] <= 1


def subjects_by_precision(monkeypatch, opened):
    """Bundles with correct results in fp32 and wrong masks in int8."""

    @contextlib.contextmanager
    def from_bundle(bundle, *, precision, **rest):
        opened.append(precision)

        def answer(_, item):
            mask = np.zeros_like(item.mask) if precision == "int8" else item.mask
            return mask, [item.name], item.caption

        yield Oracle(StandInScenes(), answer)
        opened.remove(precision)

    monkeypatch.setattr("tap_deploy.cli.evaluate.demo.TapPredictor.from_bundle", from_bundle)


def test_precisions_stand_side_by_side_and_can_be_required(run, micro_bundle, monkeypatch):
    opened = []
    subjects_by_precision(monkeypatch, opened)
    args = [str(micro_bundle.path), "--regions", "4", "--json"]
    both = ["--precision", "fp32", "--precision", "int8", "--precision", "fp32"]
    scores = json.loads(run(*args, *both))
    assert list(scores) == ["onnxruntime fp32", "onnxruntime int8"]
    assert scores["onnxruntime fp32"]["box"]["mask_iou"] == 1.0
    assert scores["onnxruntime int8"]["box"]["mask_iou"] == 0.0
    assert opened == []  # each was closed again
    assert run(*args, "--require")  # fp32 alone reaches everything
    with pytest.raises(VerificationError, match="2 targets are missed: onnxruntime int8: mask"):
        run(*args, *both, "--require")


def test_a_missed_target_is_exit_code_1_and_the_table_is_there(micro_bundle, monkeypatch):
    monkeypatch.setattr(
        "tap_deploy.training.scenes.scenes.SceneGenerator", lambda *_: StandInScenes()
    )
    subjects_by_precision(monkeypatch, [])
    args = ["eval", "demo", str(micro_bundle.path), "--regions", "2", "--precision", "int8"]
    assert CliRunner().invoke(main, args).exit_code == 0
    result = CliRunner().invoke(main, [*args, "--require"])
    assert result.exit_code == 1 and "mask_iou" in result.stdout
    assert result.stderr.startswith("error: 2 targets are missed: ")


def test_pytorch_stands_beside_a_bundle_of_the_shipped_weights(
    run, micro_bundle, assets, monkeypatch, tmp_path
):
    demo = DemoModel(folder=tmp_path)
    demo.weights.write_bytes(assets["checkpoint"].read_bytes())
    monkeypatch.setattr("tap_deploy.cli.evaluate.demo.DemoModel", lambda: demo)
    scores = json.loads(run(str(micro_bundle.path), "--regions", "1", "--json"))
    assert list(scores) == ["PyTorch", "onnxruntime fp32"]


def test_without_a_bundle_the_shipped_model_is_scored(
    run, micro_bundle, assets, monkeypatch, tmp_path
):
    demo = DemoModel(folder=tmp_path)
    for path in (demo.weights, demo.concepts, demo.tokenizer):
        path.write_bytes(assets["checkpoint"].read_bytes() if path == demo.weights else b"")
    monkeypatch.setattr("tap_deploy.cli.evaluate.demo.DemoModel", lambda: demo)
    exported = []

    def export_demo(given, output):
        exported.append(given)
        return micro_bundle

    monkeypatch.setattr("tap_deploy.export.demo.export_demo", export_demo)
    scores = json.loads(run("--regions", "1", "--json"))
    assert list(scores) == ["PyTorch", "onnxruntime fp32"] and exported == [demo]


def test_what_cannot_be_evaluated_is_said(run, micro_bundle, assets, tmp_path):
    with pytest.raises(InputError, match="--config without --checkpoint"):
        run(str(micro_bundle.path), "--config", str(assets["config"]))
    with pytest.raises(InputError, match="--checkpoint without BUNDLE"):
        run("--checkpoint", str(assets["checkpoint"]))
    with pytest.raises(BundleError, match="is not a folder"):
        run(str(tmp_path / "nothing"))


def test_nothing_heavy_is_imported_for_it():
    """A bundle is evaluated without torch."""
    code = (
        "import sys, tap_deploy.cli.evaluate.demo, tap_deploy.training.scores.evaluation\n"
        "import tap_deploy.training.scenes.scenes\n"
        "print(*{'torch', 'onnx', 'onnxruntime'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not result.stdout.split()
