"""From a training run to the files that are shipped, on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from training_standin import TINY, StandInScenes, vocabulary

from tap_deploy.cli import main
from tap_deploy.concepts import Vocabulary
from tap_deploy.config import DEMO, VARIANTS
from tap_deploy.demo_model import DemoModel, load_samples
from tap_deploy.errors import CheckpointError, InputError, VerificationError
from tap_deploy.reference.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from tap_deploy.storage.files import sha256_of_file
from tap_deploy.training.run.initialize import new_model
from tap_deploy.training.run.progress import training_summary
from tap_deploy.training.run.run_folder import RunFolder
from tap_deploy.training.scores.evaluation import PromptScores, Scores
from tap_deploy.training.scores.targets import TARGETS, missed_targets, require_targets
from tap_deploy.training.ship import ship as shipping
from tap_deploy.training.ship.model_card import CardFacts, model_card
from tap_deploy.training.ship.ship import ShipOptions, ship, shipped_state
from tap_deploy.training.words.caption_tokenizer import train_tokenizer

GOOD = PromptScores(
    mask_iou=0.9,
    concept_top1=0.9,
    concept_top5=0.96,
    caption_named=0.9,
    caption_exact=0.7,
    cider=500.0,
)


def scores_of(box: PromptScores = GOOD, point: PromptScores = GOOD) -> Scores:
    return Scores(regions=1000, box=box, point=point)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of an untrained run with a report."""
    folder = RunFolder(path=tmp_path_factory.mktemp("training") / "run")
    texts = [item.caption for seed in range(100) for item in StandInScenes().scene(seed).objects]
    folder.begin(TINY, vocabulary(), train_tokenizer(texts, TINY.model.vocab_size))
    save_checkpoint(new_model(TINY.model, 0).eval(), folder.model)
    reports = [(20, 0.5), (40, 0.25), (40, 0.5), (60, 1.0)]  # resumed once from step 20
    lines = [
        json.dumps({"step": step, "steps": 60, "seconds_per_step": seconds})
        for step, seconds in reports
    ]
    folder.progress.write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def shipped(run, tmp_path_factory):
    output, said = tmp_path_factory.mktemp("shipped") / "demo", []
    options = ShipOptions(regions=4, sample_seeds=(0, 1))
    facts = ship(run, output, StandInScenes(1), options, said.append)
    return DemoModel(folder=output), facts, said


def test_every_file_is_there_and_fits(run, shipped):
    demo, facts, said = shipped
    found = {path.relative_to(demo.folder).as_posix() for path in demo.folder.rglob("*.*")}
    assert found == {
        "MODEL_CARD.md",
        "concepts.npz",
        "samples/1.png",
        "samples/2.png",
        "samples/samples.json",
        "scores.json",
        "tap_demo.json",
        "tap_demo.safetensors",
        "tokenizer.model",
    }
    assert demo.require() == demo
    assert demo.tokenizer.read_bytes() == run.tokenizer.read_bytes()
    assert Vocabulary.load(demo.concepts).names == vocabulary().names
    assert json.loads(demo.config.read_text()) == TINY.model.to_dict()
    assert facts.weights_bytes == demo.weights.stat().st_size
    assert said[0].startswith("weights of step 60")


def test_the_weights_are_those_of_the_run_in_float16(run, shipped):
    stored = read_checkpoint(shipped[0].weights).state_dict
    model, _ = load_checkpoint(run.model, TINY.model)
    loaded, _ = load_checkpoint(shipped[0].weights, TINY.model)
    for name, value in model.named_parameters():
        assert stored[name].dtype == torch.float16
        assert torch.equal(loaded.get_parameter(name), value.half().float())
    for name, value in model.named_buffers():
        assert torch.equal(loaded.get_buffer(name), value), name
    assert not any(name.endswith(("index", "num_batches_tracked")) for name in stored)


def test_both_columns_were_measured_and_are_in_the_card(shipped):
    demo, facts, _ = shipped
    values = json.loads(demo.scores.read_text())
    assert list(values["scores"]) == ["PyTorch", "onnxruntime fp32"]
    for column in values["scores"].values():
        assert column["regions"] == 4
    pytorch, onnx = facts.scores.values()
    assert pytorch.box.mask_iou == pytest.approx(onnx.box.mask_iou, abs=1e-3)
    assert values["training"]["step"] == 60 and values["training"]["seed"] == TINY.seed
    assert set(values["tools"]) == {"tap-deploy", "torch", "onnxruntime", "numpy"}
    card = demo.card.read_text()
    assert f"| mask mIoU, full picture size | box | {pytorch.box.mask_iou:.3f} |" in card
    assert "(missed)" in card  # nothing was learned, and the card says so
    assert "60 of 60 steps" in card and facts.weights_sha256 in card
    assert "tap-export eval demo" in card and "OFL" in card and "CC0" in card


def test_the_card_tells_of_every_run_that_led_to_the_weights(run, tmp_path):
    second = RunFolder(path=tmp_path / "second")
    config = dataclasses.replace(TINY, steps=30, seed=7, mask_weight=4.0)
    second.begin(config, vocabulary(), run.tokenizer.read_bytes(), run.model)
    assert not second.is_finished() and run.is_finished()
    second.progress.write_text('{"step": 30, "steps": 30, "seconds_per_step": 120}\n')
    assert second.is_finished()
    card = model_card(
        CardFacts(
            scores={"PyTorch": scores_of()},
            parameters=1,
            names=1,
            weights_bytes=1,
            weights_sha256="",
            training=json.loads(json.dumps(second.summary())),
            history="",
            tools={},
        )
    )
    digest = sha256_of_file(run.model)[:12]
    one, two = (line for line in card.splitlines() if re.match(r"\d\. From ", line))
    assert one.startswith("1. From new weights: 60 of 60 steps") and "0.0 hours" in one
    assert two.startswith(f"2. From weights of SHA-256 `{digest}…`: 30 of 30 steps")
    assert "seed 7" in two and "4 for masks," in two and "1.0 hours" in two


def test_a_wrong_export_does_not_look_like_a_missed_target(run, monkeypatch):
    def ship(*arguments):
        raise VerificationError("the graphs differ")

    monkeypatch.setattr(shipping, "ship", ship)
    monkeypatch.setitem(VARIANTS, DEMO, TINY.model)
    monkeypatch.setattr(
        "tap_deploy.training.scenes.scenes.SceneGenerator", lambda *_: StandInScenes(1)
    )
    result = CliRunner().invoke(shipping.ship_command, [str(run.path)])
    assert result.exit_code == 2 and "nothing was written: the graphs differ" in result.stderr


def test_the_samples_ask_for_the_objects_of_the_scenes(shipped):
    samples = load_samples(shipped[0].samples)
    assert [sample.seed for sample in samples] == [0, 1]
    for sample in samples:
        objects = StandInScenes(1).scene(sample.seed).objects
        assert [region.prompt for region in sample.regions] == ["point", "box"]
        for region, item in zip(sample.regions, objects, strict=True):
            assert (region.name, region.caption) == (item.name, item.caption)
            np.testing.assert_array_equal(region.mask, item.mask)


def test_the_hours_of_a_run_that_was_resumed(run):
    summary = training_summary(run.progress)
    # 20 * 0.5 + 20 * 0.25 + 20 * 1.0 seconds; repeated steps count once.
    assert summary == {"step": 60, "steps": 60, "hours": round(35 / 3600, 3)}


def test_what_cannot_be_shipped_is_refused(run, tmp_path):
    options = ShipOptions(regions=1, sample_seeds=(0,))
    empty = RunFolder(path=tmp_path / "begun")
    empty.begin(TINY, vocabulary(), run.tokenizer.read_bytes())
    with pytest.raises(InputError, match="the run has no report yet"):
        ship(empty, tmp_path / "out", StandInScenes(1), options, lambda line: None)
    with pytest.raises(InputError, match="contains no report of a run"):
        training_summary(empty.progress)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"not a folder with tap_demo\.json"):
        ship(run, tmp_path / "precious", StandInScenes(1), options, lambda line: None)
    result = CliRunner().invoke(shipping.ship_command, [str(run.path)], standalone_mode=False)
    assert "has a model of other sizes" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_weights_beyond_float16_are_refused():
    model = new_model(TINY.model, 0)
    with torch.no_grad():
        model.image_encoder.patch_embed.proj.bias[0] = -70000.0
    with pytest.raises(CheckpointError, match=r"patch_embed\.proj\.bias reaches 70000; .*65504"):
        shipped_state(model)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.prompt} {target.measure}")
def test_every_target_can_be_missed(target):
    assert missed_targets({"a": scores_of()}) == []
    for value in (target.least - 0.001, float("nan")):
        low = dataclasses.replace(GOOD, **{target.measure: value})
        missed = scores_of(**{target.prompt: low})
        (line,) = missed_targets({"fine": scores_of(), "int8": missed})
        assert line.startswith(f"int8: {target.text} ")
    just = dataclasses.replace(GOOD, **{target.measure: target.least})
    require_targets({"a": scores_of(**{target.prompt: just})})
    with pytest.raises(VerificationError, match="1 targets are missed") as caught:
        require_targets({"a": missed})
    assert caught.value.exit_code == 1


@pytest.fixture
def incomplete(monkeypatch, tmp_path):
    """A package without the weights."""
    demo = DemoModel(folder=tmp_path / "demo")
    monkeypatch.setattr("tap_deploy.cli.model_options.DemoModel", lambda: demo)
    monkeypatch.setattr("tap_deploy.cli.evaluate.demo.DemoModel", lambda: demo)
    return demo


@pytest.mark.parametrize("command", [["export", "--model", DEMO, "-o", "x"], ["eval", "demo"]])
def test_missing_weights_are_said(incomplete, command):
    result = CliRunner().invoke(main, command, standalone_mode=False)
    assert isinstance(result.exception, CheckpointError)
    assert str(incomplete.weights) in str(result.exception)
    assert "python -m tap_deploy.training.ship.ship RUN" in str(result.exception)


def test_export_finds_all_files_of_the_demo_model(monkeypatch, tmp_path):
    """Uses small files in place of those in the package."""
    demo = DemoModel(folder=tmp_path)
    save_checkpoint(shipped_state(new_model(TINY.model, 0)), demo.weights)
    for path in (demo.concepts, demo.tokenizer):
        path.write_bytes(b"")
    given = {}

    def export_bundle(model, output, **options):
        given.update(options, config=model.config, output=output)
        raise InputError("far enough")

    monkeypatch.setattr("tap_deploy.cli.model_options.DemoModel", lambda: demo)
    monkeypatch.setitem(VARIANTS, DEMO, TINY.model)
    monkeypatch.setattr("tap_deploy.export.bundle_export.export_bundle", export_bundle)
    command = ["export", "--model", DEMO, "-o", str(tmp_path / "out")]
    for extra, concepts in (([], demo.concepts), (["--concepts", "mine.npz"], "mine.npz")):
        result = CliRunner().invoke(main, [*command, *extra], standalone_mode=False)
        assert str(result.exception) == "far enough"
        assert given["name"] == DEMO and given["config"] == TINY.model
        assert str(given["concepts"]) == str(concepts)
        assert given["tokenizer"] == demo.tokenizer
        assert given["checkpoint"].file == "tap_demo.safetensors"
        assert not given["checkpoint"].synthetic
