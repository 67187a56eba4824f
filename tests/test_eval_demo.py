"""``tap-export eval-demo``: PyTorch and a bundle, side by side on the same scenes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

from training_standin import StandInScenes

from tap_deploy.cli import main
from tap_deploy.errors import BundleError, InputError


@pytest.fixture
def run(monkeypatch):
    """Run the command on stand-in scenes; returns its output."""
    made = []

    def scenes(split, image_size):
        made.append((split, image_size))
        return StandInScenes()

    monkeypatch.setattr("tap_deploy.training.scenes.SceneGenerator", scenes)

    def invoke(*args):
        result = CliRunner().invoke(main, ["eval-demo", *args], standalone_mode=False)
        if result.exception is not None:
            raise result.exception
        assert made == [("test", 512)]
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


def test_what_cannot_be_evaluated_is_said(run, micro_bundle, assets, tmp_path):
    with pytest.raises(InputError, match="--config without --checkpoint"):
        run(str(micro_bundle.path), "--config", str(assets["config"]))
    with pytest.raises(BundleError, match="is not a folder"):
        run(str(tmp_path / "nothing"))


def test_nothing_heavy_is_imported_for_it():
    """A bundle is evaluated without torch."""
    code = (
        "import sys, tap_deploy.cli.eval_demo, tap_deploy.training.evaluation\n"
        "import tap_deploy.training.scenes\n"
        "print(*{'torch', 'onnx', 'onnxruntime'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not result.stdout.split()
