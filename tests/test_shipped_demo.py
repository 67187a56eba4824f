"""The shipped demo model: files, size, scores, and results on its sample pictures.

These tests fail without the weights, as the package is incomplete without them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("torch")

from needs import needs_font, needs_photographs

from tap_deploy.cli import main
from tap_deploy.concepts import Vocabulary
from tap_deploy.config import DEMO, VARIANTS, TapConfig
from tap_deploy.demo_model import MAX_WEIGHTS_BYTES, PROMPT_KINDS, DemoModel, load_samples
from tap_deploy.machine.cpu import cpu_has_bf16
from tap_deploy.machine.host import Host
from tap_deploy.reference.checkpoint import load_checkpoint, read_checkpoint
from tap_deploy.tokenizer import Tokenizer
from tap_deploy.training.scores.evaluation import PromptScores, Scores
from tap_deploy.training.scores.metrics import first_name
from tap_deploy.training.scores.targets import TARGETS, missed_targets
from tap_deploy.training.words.concept_space import concept_vocabulary


@pytest.fixture(scope="module")
def facts():
    return json.loads(DemoModel().scores.read_text("utf-8"))


@pytest.fixture(scope="module")
def scores(facts):
    return {
        name: Scores(
            regions=values["regions"],
            box=PromptScores(**values["box"]),
            point=PromptScores(**values["point"]),
        )
        for name, values in facts["scores"].items()
    }


def test_tokenizer_concepts_and_config_belong_to_the_variant():
    demo, config = DemoModel(), VARIANTS[DEMO]
    assert TapConfig.from_dict(json.loads(demo.config.read_text("utf-8"))) == config
    assert Tokenizer(demo.tokenizer).vocab_size == config.vocab_size
    vocabulary, expected = Vocabulary.load(demo.concepts), concept_vocabulary()
    assert vocabulary.names == expected.names and len(vocabulary) >= 100
    np.testing.assert_array_equal(vocabulary.weights, expected.weights)


def test_the_samples_ask_in_every_way_about_things_that_have_names():
    samples = load_samples()
    assert 4 <= len(samples) <= 6
    names = concept_vocabulary().names
    for sample in samples:
        with Image.open(sample.picture) as picture:
            assert picture.size == (256, 256) and picture.mode == "RGB"
        assert {region.prompt for region in sample.regions} == set(PROMPT_KINDS)
        sample.prompts().check(256, 256)
        for region in sample.regions:
            assert region.name in names and region.name in region.caption
            assert region.mask.shape == (256, 256) and region.mask.any()
    about = json.loads((DemoModel().samples / "samples.json").read_text("utf-8"))
    assert "CC0" in about["licence"] and "OFL" in about["licence"]


@needs_font
@needs_photographs
def test_the_samples_are_what_the_generator_makes():
    from tap_deploy.training.scenes.scenes import SceneGenerator
    from tap_deploy.training.ship.sample_scenes import SAMPLE_SEEDS

    samples = load_samples()
    assert tuple(sample.seed for sample in samples) == SAMPLE_SEEDS
    scene = SceneGenerator("test").scene(samples[0].seed)
    with Image.open(samples[0].picture) as picture:
        difference = np.abs(np.asarray(picture, np.int16) - scene.image)
    assert difference.mean() < 0.5  # another Pillow may round elsewhere
    for region, item in zip(samples[0].regions, scene.objects, strict=True):
        assert (region.name, region.caption) == (item.name, item.caption)
        assert np.count_nonzero(region.mask != item.mask) < 20


def test_the_weights_are_small_and_those_that_were_measured(facts):
    weights = DemoModel().require().weights
    assert weights.stat().st_size <= MAX_WEIGHTS_BYTES
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == facts["weights_sha256"]
    model, checkpoint = load_checkpoint(weights, VARIANTS[DEMO])
    assert checkpoint.format == "safetensors"
    stored = read_checkpoint(weights).state_dict
    parameters = {name for name, _ in model.named_parameters()}
    assert {str(stored[name].dtype) for name in parameters} == {"torch.float16"}
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["parameters"]


def test_the_run_was_finished(facts):
    assert facts["training"]["step"] == facts["training"]["steps"]


def test_the_shipped_numbers_reach_the_targets(scores):
    assert set(scores) == {"PyTorch", "onnxruntime fp32"}
    assert all(score.regions >= 1000 for score in scores.values())
    for target in TARGETS:
        found = [target.found(score) for score in scores.values()]
        assert found[0] == pytest.approx(found[1], abs=0.005), target.text  # it is one model
        assert min(found) >= target.least, target.text
    assert missed_targets(scores) == []


def test_the_card_tells_these_numbers(facts, scores):
    card = DemoModel().card.read_text("utf-8")
    assert facts["weights_sha256"] in card and "tap-export eval demo" in card
    for score in scores.values():
        for prompt in (score.box, score.point):
            assert f" {prompt.mask_iou:.3f} " in card and f" {prompt.cider:.1f} " in card
    assert "(missed)" not in card


def test_the_exported_model_sees_what_is_in_the_sample_pictures(tmp_path, monkeypatch, capsys):
    """Export and predict with every kind of prompt, then run the first program of README.md."""
    runner = CliRunner()
    bundle = str(tmp_path / "bundle")
    exported = runner.invoke(main, ["export", "--model", DEMO, "-o", bundle], standalone_mode=False)
    assert exported.exception is None, exported.output
    result = runner.invoke(
        main,
        ["samples", bundle, "--json", "--overlays", str(tmp_path / "overlays")],
        standalone_mode=False,
    )
    assert result.exception is None, result.output
    answers = json.loads(result.output)
    assert len(answers) == sum(len(sample.regions) for sample in load_samples())
    names = concept_vocabulary().names
    for kind in PROMPT_KINDS:
        ious = [answer["mask_iou"] for answer in answers if answer["prompt"] == kind]
        # 0.79 on 1,000 regions with a point; the mean of five is off by 0.05 now and then.
        assert np.mean(ious) > 0.7, kind
    # 0.96 each on 1,000 regions; one of the few here may be among the others.
    assert np.mean([answer["name"] == answer["right_name"] for answer in answers]) > 0.85
    named = [first_name(a["caption"], names) == a["right_name"] for a in answers]
    assert np.mean(named) > 0.85
    for sample in load_samples():
        with Image.open(tmp_path / "overlays" / sample.picture.name) as overlay:
            assert overlay.size == (1024, 1024)

    # On another backend, with bf16 if the CPU has it: the same names and captions.
    has_bf16 = importlib.util.find_spec("openvino") and cpu_has_bf16(Host())
    precision = "bf16" if has_bf16 else "fp32"
    how = ["--backend", "cpu", "--precision", precision, "--json"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = runner.invoke(main, ["samples", bundle, *how], standalone_mode=False)
    assert result.exception is None, result.output
    for answer, expected in zip(json.loads(result.stdout), answers, strict=True):
        assert answer["mask_iou"] == pytest.approx(expected["mask_iou"], abs=0.01)
        assert (answer["name"], answer["caption"]) == (expected["name"], expected["caption"])

    root = Path(__file__).resolve().parent.parent
    program = re.search(r"```python\n(.*?)```", (root / "README.md").read_text("utf-8"), re.DOTALL)
    assert program is not None and '"tap_demo"' in program[1]
    monkeypatch.chdir(root)
    capsys.readouterr()
    exec(program[1].replace('"tap_demo"', repr(bundle)), {})
    assert capsys.readouterr().out == program[1].rsplit("# ", 1)[1]


def test_the_first_picture_of_the_readme_is_the_overlay():
    root = Path(__file__).resolve().parent.parent
    first = re.search(r"!\[[^\]]*\]\(([^)]*)\)", (root / "README.md").read_text("utf-8"))
    assert first is not None and first[1] == "docs/overlay.png"
    with Image.open(root / first[1]) as picture:
        assert picture.size == (1024, 1024)
