"""``tap-export eval``: a bundle and its checkpoint side by side, continued, as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("pycocotools")
pytest.importorskip("pycocoevalcap")
pytest.importorskip("torch")

from made_data_sets import MadeData
from training_standin import NAMES, StandInScenes

from tap_deploy.cli import main
from tap_deploy.concepts import Vocabulary
from tap_deploy.evaluation.published import PUBLISHED
from tap_deploy.evaluation.report import Report


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return MadeData(tmp_path_factory.mktemp("data"), StandInScenes(), 3, NAMES)


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    monkeypatch.setattr("tap_deploy.evaluation.caption_scores.shutil.which", lambda name: None)

    def invoke(protocol, *args, annotations, code=0):
        command = ["eval", protocol, "-o", str(tmp_path / "answers"), *map(str, args)]
        if "--images" not in args:
            command += ["--images", str(data.images)]
        command += ["--annotations", str(annotations)]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == code, result.output
        return result.stderr if code else result.stdout

    return invoke


def test_a_bundle_and_its_checkpoint_agree_on_masks(run, data, micro_bundle, assets):
    args = (micro_bundle.path, assets["checkpoint"], "--detections", data.detections)
    table = run("coco-seg", *args, annotations=data.coco)
    heads = [line.split() for line in table.splitlines()[:2]]
    assert heads[0] == ["onnxruntime", "difference", *["published"] * 3]
    assert heads[1] == ["coco-seg", "PyTorch", "fp32", "fp32", "TAP-B", "TAP-L", "TAP-H"]
    assert "3 pictures" in table and "differences to PyTorch" in table
    report = json.loads(run("coco-seg", *args, "--resume", "--json", annotations=data.coco))
    for name, value in report["differences"]["onnxruntime fp32"].items():
        assert value is None or abs(value) < 0.5, name
    assert report["scores"]["PyTorch"]["mIoU 3pt"] > 0
    assert report["published"]["TAP-H"]["AP"] == 46.3


@pytest.fixture
def concepts(micro_config, tmp_path):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(micro_config.sem_embed_dim, len(NAMES))).astype(np.float32)
    path = tmp_path / "names.npz"
    Vocabulary(weights=weights, names=NAMES).save(path)
    return path


def test_names_and_captions_are_scored(run, data, micro_bundle, assets, concepts):
    both = (micro_bundle.path, assets["checkpoint"], "--json")
    found = json.loads(run("lvis-cls", *both, "--concepts", concepts, annotations=data.lvis))
    assert found["regions"] == 6
    assert found["scores"]["PyTorch"] == pytest.approx(found["scores"]["onnxruntime fp32"], abs=1)
    said = json.loads(run("vg-caption", *both, annotations=data.vg_test))
    assert said["scores"]["PyTorch"] == said["scores"]["onnxruntime fp32"]
    assert said["scores"]["PyTorch"]["METEOR"] is None
    assert said["conditions"]["words by"] == "tap_deploy (without Java)"
    assert said["published"]["paper"] == {"CIDEr": 164.7}


def test_a_stopped_run_is_continued(run, data, micro_bundle, monkeypatch, tmp_path):
    from tap_deploy.predictor import TapPredictor

    asked, encode = [], TapPredictor.encode

    def stopping(self, image):
        asked.append(image.source.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return encode(self, image)

    monkeypatch.setattr(TapPredictor, "encode", stopping)
    run("vg-caption", micro_bundle.path, annotations=data.vg_test, code=130)
    (path,) = (tmp_path / "answers").iterdir()
    assert len(path.read_text().splitlines()) == 1 + 2
    error = run("vg-caption", micro_bundle.path, annotations=data.vg_test, code=2)
    assert "has answers for 2 pictures; pass --resume to continue" in error
    run("vg-caption", micro_bundle.path, "--resume", annotations=data.vg_test)
    assert asked[3:] == [f"{number}.png" for number in data.ids[2:]]
    whole = path.read_text()
    run("vg-caption", micro_bundle.path, "--resume", annotations=data.vg_test)
    assert path.read_text() == whole and len(asked) == 4  # nothing is asked again
    part = run(
        "vg-caption", micro_bundle.path, "--resume", "--limit", "2", annotations=data.vg_test
    )
    assert "2 pictures, 4 regions" in part


def test_processes_share_the_pictures(run, data, micro_bundle):
    for index in range(2):
        shard = ("--shard", f"{index}/2")
        assert run("coco-seg", micro_bundle.path, *shard, annotations=data.coco) == ""
    together = run("coco-seg", micro_bundle.path, "--resume", "--json", annotations=data.coco)
    alone = run(
        "coco-seg", micro_bundle.path, "-o", data.images / "out", "--json", annotations=data.coco
    )
    assert json.loads(together) == json.loads(alone)
    error = run("coco-seg", micro_bundle.path, "--shard", "2/2", annotations=data.coco, code=2)
    assert "expected I/N with I from 0 to N - 1" in error


def test_a_checkpoint_alone_needs_its_sizes(run, data, assets):
    error = run("lvis-seg", assets["checkpoint"], annotations=data.lvis, code=2)
    assert "has no record of its sizes; pass --model or --config" in error
    config = ("--config", assets["config"])
    table = run("lvis-seg", assets["checkpoint"], *config, annotations=data.lvis)
    assert "mIoU 1pt" in table and "difference" not in table
    error = run("vg-caption", assets["checkpoint"], *config, annotations=data.vg_test, code=2)
    assert "no tokenizer, so no captions" in error
    said = ("--tokenizer", assets["tokenizer"])
    run("vg-caption", assets["checkpoint"], *config, *said, "--resume", annotations=data.vg_test)
    error = run("lvis-cls", assets["checkpoint"], *config, annotations=data.lvis, code=2)
    assert "no concepts to classify into; pass --concepts" in error


def test_what_cannot_be_evaluated_is_said(run, data, micro_bundle, tmp_path):
    error = run("coco-seg", tmp_path / "nothing", annotations=data.coco, code=2)
    assert "is neither a bundle nor a file of weights" in error
    error = run("lvis-cls", micro_bundle.path, annotations=data.lvis, code=2)
    assert "concepts, the annotations 6 categories" in error
    both = ("--model", "tap_demo", "--config", "x.json")
    assert "pass either --model or --config" in run(
        "coco-seg", micro_bundle.path, *both, annotations=data.coco, code=2
    )
    error = run("coco-seg", micro_bundle.path, annotations=data.images, code=2)
    assert error.startswith("error: ") and "Is a directory; pass COCO instances" in error
    os.mkfifo(tmp_path / "pipe")
    error = run("coco-seg", tmp_path / "pipe", annotations=data.coco, code=2)
    assert "pipe is neither a bundle nor a file of weights" in error


@pytest.fixture
def changed_checkpoint(assets, tmp_path):
    """A checkpoint with the same name as that of the assets, and other weights."""
    from tap_deploy.reference.checkpoint import read_checkpoint, save_checkpoint

    state = {
        name: 1.5 * tensor if name.endswith(".weight") else tensor
        for name, tensor in read_checkpoint(assets["checkpoint"]).state_dict.items()
    }
    path = tmp_path / "other" / assets["checkpoint"].name
    path.parent.mkdir()
    save_checkpoint(state, path)
    return path


def test_subjects_of_one_name_have_their_own_answers(
    run, data, assets, changed_checkpoint, tmp_path
):
    first = assets["checkpoint"]
    args = (first, changed_checkpoint, "--config", assets["config"], "--json")
    found = json.loads(run("coco-seg", *args, annotations=data.coco))["scores"]
    assert list(found) == [f"PyTorch {first}", f"PyTorch {changed_checkpoint}"]
    assert len(list((tmp_path / "answers").iterdir())) == 2
    alone = (changed_checkpoint, "--config", assets["config"], "--json", "--resume")
    again = json.loads(run("coco-seg", *alone, annotations=data.coco))["scores"]
    assert again == {"PyTorch": found[f"PyTorch {changed_checkpoint}"]}
    assert again["PyTorch"] != found[f"PyTorch {first}"]


def test_one_subject_twice_is_refused(run, data, micro_bundle, assets):
    path = micro_bundle.path
    error = run("coco-seg", path, path.parent / "." / path.name, annotations=data.coco, code=2)
    assert "are the same subject, by the hashes of their files; pass it once" in error


def test_labels_tell_paths_apart(monkeypatch, tmp_path):
    from tap_deploy.cli.evaluate.subjects import _labels

    def labels(*names):
        return list(_labels([pathlib.Path(name) for name in names]).values())

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert labels("v1/tap") == [""]
    assert labels("v1/tap", "v2/tap", "v2/other") == ["v1/tap", "v2/tap", "other"]
    assert labels(".", "v2/tap") == ["here", "tap"]
    assert labels(".", "v2/here", "/") == [".", "v2/here", "/"]


def test_answers_of_other_inputs_are_not_continued(run, data, assets, micro_config, tmp_path):
    from tap_deploy.cli.evaluate.subjects import Subjects, WeightsOptions

    def keys(**options):
        weights = dict.fromkeys(("model", "config", "concepts", "tokenizer"))
        weights |= {"config": assets["config"]} | options
        (candidate,) = Subjects([str(assets["checkpoint"])], WeightsOptions(**weights)).candidates(
            []
        )
        return candidate.key

    config = tmp_path / "config.json"
    other = dataclasses.replace(micro_config, text_seq_len=micro_config.text_seq_len - 1)
    config.write_text(json.dumps(other.to_dict()))
    plain, said, short = keys(), keys(tokenizer=assets["tokenizer"]), keys(config=config)
    assert {name for name in plain if plain[name] != said[name]} == {"tokenizer"}
    assert {name for name in plain if plain[name] != short[name]} == {"config"}

    args = (assets["checkpoint"], "--config", assets["config"], "--resume")
    run("coco-seg", *args, annotations=data.coco)
    shutil.copytree(data.images, tmp_path / "images")
    run("coco-seg", *args, "--images", tmp_path / "images", annotations=data.coco)
    assert len(list((tmp_path / "answers").iterdir())) == 2


def test_the_table_stands_in_columns():
    scores = {
        "PyTorch": {"CIDEr": 154.66, "METEOR": None},
        "cpu int8": {"CIDEr": 154.2, "METEOR": 17.0},
    }
    report = Report(
        protocol="vg-caption", pictures=5, regions=9, conditions={"a": "1"}, scores=scores
    )
    lines = str(report).replace("\N{EN DASH}", "-").splitlines()
    assert lines[:4] == [
        "                       cpu  difference  published  published  published  published",
        "vg-caption  PyTorch   int8        int8      TAP-B      TAP-L      TAP-H      paper",
        "CIDEr         154.7  154.2       -0.46      152.3      154.7      154.2      164.7",
        "METEOR            -   17.0           -       17.7       17.9       17.8          -",
    ]
    assert "5 pictures, 9 regions; a 1; differences to PyTorch." in str(report)


def test_published_figures_have_the_names_of_the_metrics():
    from tap_deploy.evaluation.average_precision import COCO_METRICS, LVIS_METRICS
    from tap_deploy.evaluation.caption_scores import CAPTION_METRICS

    metrics = {
        "coco-seg": COCO_METRICS,
        "lvis-seg": LVIS_METRICS,
        "lvis-cls": LVIS_METRICS,
        "vg-caption": CAPTION_METRICS,
    }
    for protocol, models in PUBLISHED.items():
        for found in models.values():
            assert set(found) <= set(metrics[protocol])
        assert set(models["TAP-L"]) == set(metrics[protocol])


def test_pytorch_encodes_once_and_returns_run_lengths(micro_model, photo):
    from tap_deploy.masks import rle_from_mask
    from tap_deploy.prompts import Prompts
    from tap_deploy.reference.predictor import ReferencePredictor

    subject = ReferencePredictor(micro_model, None, None)
    prompts = Prompts.from_boxes([[10, 10, 90, 80], [50, 20, 200, 150]])
    image = subject.encode(photo)
    full = subject.predict(photo, prompts=prompts, captions=False)
    short = subject.predict(image, prompts=prompts, masks="rle", captions=False)
    assert short.masks is None and short.rles == [rle_from_mask(mask) for mask in full.masks]
    none = subject.predict(image, prompts=prompts, masks=False, captions=False)
    assert none.masks is None and none.rles is None
