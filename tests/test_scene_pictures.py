"""Scenes as files: calibration and verdict read back the objects of the scene."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")  # the stand-in scenes configure a training
pytest.importorskip("onnx_ir")
from click.testing import CliRunner
from training_standin import SIZE, StandInScenes

from tap_deploy.engines.calibration.pictures import CalibrationImages
from tap_deploy.engines.calibration.prompts import CalibrationPrompts
from tap_deploy.errors import InputError
from tap_deploy.training.scenes import scene_pictures
from tap_deploy.training.scenes.scene_pictures import PROMPTS_FILE, main, write_pictures


def test_pictures_and_prompts_come_back(tmp_path):
    scenes = [StandInScenes().scene(seed) for seed in range(3)]
    assert write_pictures(scenes, tmp_path / "new", ("box", "point", "sketch")) == 6
    images = CalibrationImages.from_path(tmp_path / "new")
    prompts = CalibrationPrompts.from_file(tmp_path / "new" / PROMPTS_FILE)
    kinds = []
    for scene in scenes:
        name = f"{scene.split}-{scene.seed}.png"
        path = tmp_path / "new" / name
        np.testing.assert_array_equal(np.asarray(Image.open(path)), scene.image)
        digest = images.digests[images.paths.index(path)]
        assert sum(len(p) for p in prompts.for_image(path, digest, SIZE, SIZE)) == 2
        kinds += sorted(prompts.own[name])
        for kind, asked in prompts.own[name].items():
            for one in asked:
                if kind == "boxes":
                    assert any(item.box.tolist() == one for item in scene.objects)
                else:
                    pixels = [(round(y), round(x)) for x, y, *_ in one]
                    assert any(all(item.mask[p] for p in pixels) for item in scene.objects)
    assert kinds == ["boxes", "points", "boxes", "sketches", "points", "sketches"]


def test_prompts_are_not_overwritten(tmp_path):
    write_pictures([StandInScenes().scene(0)], tmp_path)
    with pytest.raises(InputError, match=r"already contains prompts\.json"):
        write_pictures([StandInScenes().scene(1)], tmp_path)


def test_command(tmp_path, monkeypatch):
    monkeypatch.setattr(scene_pictures, "SceneGenerator", lambda split: StandInScenes())
    command = ["--split", "test", "--first-seed", "7", "--count", "2", "-o", str(tmp_path / "a")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0 and "2 scenes of split test, 4 regions" in result.output
    own = json.loads((tmp_path / "a" / PROMPTS_FILE).read_text("utf-8"))
    assert all(set(kinds) == {"boxes", "points"} for kinds in own.values())
    assert CliRunner().invoke(main, command).exit_code == 2
