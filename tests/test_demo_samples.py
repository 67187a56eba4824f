"""Sample pictures: prompts, expected results, and the display of a bundle's results."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from tap_deploy.cli import main
from tap_deploy.cli.prompt_options import load_sketch
from tap_deploy.cli.samples import SampleAnswer, describe
from tap_deploy.config import PointLabel
from tap_deploy.demo_model import Sample, SampleRegion, load_samples, save_samples
from tap_deploy.errors import InputError
from tests.fake_cuda import block_cuda

MASK = np.zeros((48, 64), np.bool_)
MASK[10:20, 30:50] = True


def region(prompt, *points):
    return SampleRegion(
        prompt=prompt, points=points, name="owl", caption="a gray owl on the right", mask=MASK
    )


@pytest.fixture
def folder(tmp_path):
    """Two pictures; only the first has a stroke prompt."""
    for name in ("1.png", "2.png"):
        Image.new("RGB", (64, 48), (90, 120, 150)).save(tmp_path / name)
    first = (
        region("point", (40.0, 15.0)),
        region("box", (30.0, 10.0), (50.0, 20.0)),
        region("sketch", (31.0, 12.0), (40.0, 15.0), (48.0, 18.0)),
    )
    samples = (
        Sample(picture=tmp_path / "1.png", seed=7, regions=first),
        Sample(picture=tmp_path / "2.png", seed=9, regions=first[:1]),
    )
    save_samples(samples, tmp_path, {"licence": "Apache-2.0"})
    return tmp_path


def test_samples_survive_their_file(folder):
    first, second = load_samples(folder)
    assert (first.picture, first.seed, second.seed) == (folder / "1.png", 7, 9)
    assert [each.prompt for each in first.regions] == ["point", "box", "sketch"]
    assert first.regions[1].points == ((30.0, 10.0), (50.0, 20.0))
    assert second.regions[0].caption == "a gray owl on the right"
    np.testing.assert_array_equal(first.regions[2].mask, MASK)
    assert json.loads((folder / "samples.json").read_text())["licence"] == "Apache-2.0"


def test_every_kind_of_question_becomes_the_prompt_for_it(folder):
    prompts = load_samples(folder)[0].prompts()
    prompts.check(64, 48)
    labels = prompts.labels.tolist()
    assert labels[0][:2] == [PointLabel.FOREGROUND, PointLabel.PADDING]
    assert labels[1][:2] == [PointLabel.BOX_LEFT_TOP, PointLabel.BOX_RIGHT_BOTTOM]
    assert labels[2] == [PointLabel.FOREGROUND] * 9 + [PointLabel.PADDING]
    assert prompts.coords[1, :2].tolist() == [[30, 10], [50, 20]]


def test_the_strokes_are_a_file_for_the_sketch_option_too(folder):
    (stroke,) = load_sketch(folder / "1.sketch.json")
    assert stroke.tolist() == [[31, 12], [40, 15], [48, 18]]
    assert not (folder / "2.sketch.json").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"samples": [{"picture": "1.png"}]}'])
def test_samples_that_cannot_be_read_are_said(tmp_path, content):
    with pytest.raises(InputError, match=r"samples\.json .*reinstall this package"):
        load_samples(tmp_path)
    (tmp_path / "samples.json").write_text(content)
    with pytest.raises(InputError, match=r"samples\.json .*reinstall this package"):
        load_samples(tmp_path)


def answer(name="owl", caption="a gray owl on the right"):
    return SampleAnswer(
        picture="1.png",
        prompt="box",
        mask_iou=0.5,
        name=name,
        right_name="owl",
        caption=caption,
        right_caption="a gray owl on the right",
    )


def test_a_wrong_answer_has_the_right_one_below_it():
    lines = describe([answer(), answer("cat"), answer(caption="an owl")]).splitlines()
    assert len(lines) == 6
    assert lines[0].split()[:5] == ["1.png", "box", "mask", "IoU", "0.50"]
    assert lines[2].split() == ["expected:", *["owl", "a", "gray", "owl", "on", "the", "right"]]
    assert [line.index("a gray owl") for line in lines[:3]] == [lines[0].index("a gray owl")] * 3
    assert lines[-1] == "3 regions: 2 names and 2 captions correct, mean mask IoU 0.50"


def test_a_bundle_answers_the_samples(micro_bundle, folder, monkeypatch, tmp_path):
    monkeypatch.setattr("tap_deploy.cli.samples.load_samples", lambda: load_samples(folder))
    args = ["samples", str(micro_bundle.path), "--overlays", str(tmp_path / "drawn")]
    result = CliRunner().invoke(main, [*args, "--json"])
    assert result.exit_code == 0, result.output
    answers = json.loads(result.stdout)
    assert [(each["picture"], each["prompt"]) for each in answers] == [
        ("1.png", "point"),
        ("1.png", "box"),
        ("1.png", "sketch"),
        ("2.png", "point"),
    ]
    assert all(each["right_name"] == "owl" and 0 <= each["mask_iou"] <= 1 for each in answers)
    for name in ("1.png", "2.png"):
        with Image.open(tmp_path / "drawn" / name) as overlay:
            assert overlay.size == (256, 192)


def test_samples_run_on_a_gpu_if_asked_to(micro_bundle, folder, monkeypatch):
    monkeypatch.setattr("tap_deploy.cli.samples.load_samples", lambda: load_samples(folder))
    block_cuda(monkeypatch)
    result = CliRunner().invoke(main, ["samples", str(micro_bundle.path), "--device", "cuda"])
    assert result.exit_code == 2
    assert "needs cuda-python or pycuda" in result.stderr


def test_samples_need_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, tap_deploy.cli.samples, tap_deploy.training.scores.metrics\n"
        "print(*{'torch', 'onnx', 'onnxruntime'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not result.stdout.split()
