"""The command line passes every option of ``run`` on; and the progress bar."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys

import click
import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from PIL import Image

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.concepts import Vocabulary
from tap_deploy.console.options import option_group
from tap_deploy.machine.cpu import usable_cores
from tap_deploy.predictor import TapPredictor
from tests.commands import invoke

POINT = ("--point", "285,160")
BOX = ("--box", "172,17,412,308")


@pytest.fixture
def run(micro_bundle, photo):
    """Regions of the photo, from ``run`` with some options."""

    def run_with(*options, prompts=POINT):
        result = invoke("run", micro_bundle.path, photo, *prompts, "--json", *options)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["regions"]

    return run_with


@pytest.fixture
def thread_counts(monkeypatch):
    """``intra_op_num_threads`` of every session that onnxruntime makes."""
    counts = []
    session = onnxruntime.InferenceSession

    def recorded(path, options, **rest):
        counts.append(options.intra_op_num_threads)
        return session(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recorded)
    return counts


@pytest.fixture
def predict_arguments(monkeypatch):
    """What ``run`` passes to ``TapPredictor.predict``, by name."""
    found = {}
    predict = TapPredictor.predict

    def recorded(self, image, **arguments):
        found.update(arguments)
        return predict(self, image, **arguments)

    monkeypatch.setattr(TapPredictor, "predict", recorded)
    return found


def caption_ids(regions):
    return [region["caption_ids"] for region in regions]


def test_a_group_of_options_reaches_the_command_as_one_object():
    found = []

    @click.command()
    @click.option("--first")
    @option_group("pair", dict, click.option("--a", type=int), click.option("--b", "other"))
    @click.option("--last")
    def command(**values):
        found.append(values)

    assert [option.name for option in command.params] == ["first", "a", "other", "last"]
    arguments = ["--b", "x", "--a", "1", "--last", "z"]
    assert CliRunner().invoke(command, arguments).exit_code == 0
    assert found == [{"first": None, "pair": {"a": 1, "other": "x"}, "last": "z"}]


def test_defaults_are_those_of_the_python_api(run, predict_arguments):
    run()
    del predict_arguments["prompts"], predict_arguments["on_progress"]
    assert predict_arguments == {
        "top_k": 1,
        "masks": "rle",  # the same, where nothing is drawn
        "captions": True,
        "vocabulary": None,
        "max_new_tokens": None,
        "temperature": 0.0,
        "seed": None,
        "candidates": False,
        "clip": False,
    }


def test_one_seed_repeats_and_two_differ(run):
    draw = ("--temperature", 1.5, "--seed")
    first = run(*draw, 1)
    assert first == run(*draw, 1)
    assert caption_ids(first) != caption_ids(run(*draw, 2))
    assert caption_ids(first) != caption_ids(run())


def test_temperature_and_seed_arrive(run, predict_arguments):
    run("--temperature", 0.25, "--seed", 17)
    assert (predict_arguments["temperature"], predict_arguments["seed"]) == (0.25, 17)


def test_temperature_zero_takes_the_best_token_whatever_the_seed(run):
    assert run("--seed", 1) == run("--seed", 2) == run("--temperature", 0)


def test_concepts_of_a_file_replace_those_of_the_bundle(run, micro_bundle, tmp_path):
    size = micro_bundle.config.sem_embed_dim
    weights = np.random.default_rng(0).normal(size=(size, 3)).astype(np.float32)
    names = ("teapot", "spoon", "saucer")
    Vocabulary(weights=weights, names=names).save(tmp_path / "other.npz")
    found = run("--concepts", tmp_path / "other.npz", "--top-k", 3)[0]["concepts"]
    assert sorted(concept["name"] for concept in found) == sorted(names)
    assert sum(concept["probability"] for concept in found) == pytest.approx(1, abs=1e-3)
    assert not {concept["name"] for concept in run("--top-k", 3)[0]["concepts"]} & set(names)


def test_no_captions(run):
    with_captions, without = run()[0], run("--no-captions")[0]
    assert with_captions["caption"]
    assert without["caption"] is None
    assert without["concepts"] == with_captions["concepts"]
    assert run("--captions")[0] == with_captions


@pytest.mark.parametrize("count", [0, 1, 5])
def test_max_new_tokens_shortens_the_caption(run, micro_config, count):
    (longest,), (cut,) = caption_ids(run()), caption_ids(run("--max-new-tokens", count))
    assert micro_config.pad_id not in longest[: 1 + 5]
    filling = [micro_config.pad_id] * (len(longest) - 1 - count)
    assert cut == longest[: 1 + count] + filling  # BOS comes first


@pytest.mark.parametrize("k", [1, 4])
def test_top_k_names_best_first(run, k):
    concepts = run("--top-k", k)[0]["concepts"]
    scores = [concept["probability"] for concept in concepts]
    assert len(concepts) == k
    assert scores == sorted(scores, reverse=True)


def test_every_prompt_option_is_a_region_and_may_be_repeated(run, photo, predict_arguments):
    sketch = ("--sketch", photo.parent / "sketch.json")
    regions = run(prompts=(*BOX, *sketch, *POINT, "--point", "100,100;120,90,0"))
    assert len(regions) == 4
    prompts = predict_arguments["prompts"]  # points first, then boxes, then sketches
    assert [row[row != 4].tolist() for row in prompts.labels] == [[1], [1, 0], [2, 3], [1] * 9]
    assert prompts.coords[0, 0].tolist() == [285, 160]
    assert prompts.coords[1, :2].tolist() == [[100, 100], [120, 90]]
    assert prompts.coords[2, :2].tolist() == [[172, 17], [412, 308]]


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_reach_every_session(run, thread_counts, threads):
    run("--threads", threads)
    assert thread_counts == [threads] * 3


def test_without_threads_there_is_one_per_usable_core(run, thread_counts):
    run()
    assert thread_counts == [usable_cores()] * 3


def test_verify_passes_threads_on(bundle, thread_counts):
    assert invoke("verify", bundle.path, "--threads", 1).exit_code == 0
    assert thread_counts == [1] * 3


def test_backend_and_precision_arrive(run, monkeypatch, micro_bundle):
    found = []
    from_bundle = TapPredictor.from_bundle

    def recorded(path, **named):
        found.append((path, named))
        return from_bundle(path, **named)

    monkeypatch.setattr(TapPredictor, "from_bundle", recorded)
    run("--backend", "onnxruntime", "--precision", "fp32", "--threads", 2)
    ((path, named),) = found
    assert Bundle.open(path).path == micro_bundle.path
    assert named == {
        "backend": "onnxruntime",
        "precision": "fp32",
        "device": None,
        "provider": None,
        "threads": 2,
        "allow_failed": False,
        "require_verified": False,
    }


def test_convert(micro_bundle, photo, tmp_path):
    grey = tmp_path / "grey.png"
    with Image.open(photo) as picture:
        picture.convert("L").save(grey)
    args = ["run", micro_bundle.path, grey, *POINT]
    refused = invoke(*args)
    assert refused.exit_code == 2
    assert "(--convert)" in refused.stderr
    assert invoke(*args, "--convert").exit_code == 0


def tap_export(*args, stderr):
    """The command in a process of its own: its exit code and stdout."""
    code = "from tap_deploy.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, args)]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=stderr, stdin=subprocess.DEVNULL, env=env
    )


def read_all(descriptor):
    """Read what is there; the other end stays open."""
    parts = []
    with contextlib.suppress(BlockingIOError):
        while part := os.read(descriptor, 1 << 12):
            parts.append(part)
    return b"".join(parts).decode()


def test_the_progress_bar_appears_on_a_terminal(bundle):
    controller, terminal = pty.openpty()
    try:
        result = tap_export("verify", bundle.path, stderr=terminal)
        os.set_blocking(controller, False)
        shown = read_all(controller)
    finally:
        os.close(terminal)
        os.close(controller)
    assert result.returncode == 0
    assert "verify  [" in shown
    assert "100%" in shown
    assert "PASSED" not in shown
    assert b"PASSED" in result.stdout
    assert b"100%" not in result.stdout


def test_no_progress_bar_without_a_terminal(bundle):
    result = tap_export("verify", bundle.path, stderr=subprocess.PIPE)
    assert result.returncode == 0
    assert result.stderr == b""
    assert b"PASSED" in result.stdout
