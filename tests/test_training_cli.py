"""``python -m tap_deploy.training``: start, stop, resume."""

from __future__ import annotations

import hashlib
import json
import os
import signal

import pytest

torch = pytest.importorskip("torch")

from click.testing import CliRunner
from safetensors.torch import load_file
from training_standin import TINY, StandInScenes, vocabulary

from tap_deploy.errors import InputError
from tap_deploy.training import __main__ as cli
from tap_deploy.training.words.caption_tokenizer import train_tokenizer

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the command on a tiny model and stand-in scenes; returns what it prints."""
    texts = [item.caption for seed in range(100) for item in StandInScenes().scene(seed).objects]
    monkeypatch.setattr(cli, "SceneGenerator", lambda split, size: StandInScenes(split == "train"))
    monkeypatch.setattr(cli, "concept_vocabulary", vocabulary)
    monkeypatch.setattr(cli, "train_tokenizer", lambda vocab_size: train_tokenizer(texts, 60))
    fields = {"model": TINY.model, "pictures_per_step": 2, "regions_per_picture": 2}
    begin = cli.TrainingConfig
    monkeypatch.setattr(cli, "TrainingConfig", lambda **given: begin(**fields | given))
    handlers = {each: signal.getsignal(each) for each in SIGNALS}
    threads = torch.get_num_threads()

    def invoke(*args):
        args = ["--output", str(tmp_path / "run"), "--workers", "0", "--threads", "1", *args]
        result = CliRunner().invoke(cli.train_command, args, standalone_mode=False)
        if result.exception is not None:
            raise result.exception
        return result.output

    yield invoke
    torch.set_num_threads(threads)
    for each, handler in handlers.items():
        signal.signal(each, handler)


def test_a_run_is_begun_stopped_and_finished(run, tmp_path):
    first = run("--steps", "3", "--minutes", "0", "--held-out-regions", "2")
    assert first.startswith("1/3 | total ")
    config = json.loads((tmp_path / "run/training.json").read_text())
    assert config["steps"] == 3 and config["pictures_per_step"] == 2
    second = run("--resume", "--report-every", "1", "--held-out-regions", "2")
    assert [line.split()[0] for line in second.splitlines()] == ["2/3", "3/3"]
    assert run("--resume") == ""  # nothing is left to do
    expected = {
        "concepts.npz",
        "model.json",
        "model.safetensors",
        "progress.jsonl",
        "state.pt",
        "tokenizer.model",
        "training.json",
    }
    assert {path.name for path in (tmp_path / "run").iterdir()} == expected


def test_a_run_cannot_change_halfway(run, tmp_path):
    with pytest.raises(InputError, match=r"contains no training run .* start one"):
        run("--resume")
    run("--steps", "1", "--held-out-regions", "2")
    with pytest.raises(InputError, match=r"^--learning-rate cannot change"):
        run("--resume", "--steps", "5", "--learning-rate", "1")
    with pytest.raises(InputError, match=r"^--weights cannot change"):
        run("--resume", "--weights", str(tmp_path / "run/model.safetensors"))
    with pytest.raises(InputError, match="pass --resume to continue it"):
        run("--steps", "1")


def test_a_run_begins_with_the_weights_of_another(run, tmp_path):
    run("--steps", "1", "--held-out-regions", "2")
    (tmp_path / "run").rename(tmp_path / "first")
    weights = tmp_path / "first/model.safetensors"
    run("--weights", str(weights), "--steps", "1", "--mask-weight", "4", "--held-out-regions", "2")
    assert json.loads((tmp_path / "run/training.json").read_text())["mask_weight"] == 4
    begun = load_file(tmp_path / "run/initial.safetensors")
    first = load_file(weights)
    origin = json.loads((tmp_path / "run/origin.json").read_text())
    assert origin["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert origin["run"]["step"] == origin["run"]["steps"] == 1
    assert origin["run"]["mask_weight"] == TINY.mask_weight and origin["run"]["origin"] is None
    assert begun.keys() == first.keys() and all(torch.equal(begun[k], first[k]) for k in first)
    assert run("--resume") == ""


def test_nothing_is_begun_that_could_not_go_on_here(run, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="device 'abacus' cannot be used here"):
        run("--device", "abacus")

    def no_font(split, size):
        raise InputError("no font")

    monkeypatch.setattr(cli, "SceneGenerator", no_font)
    with pytest.raises(InputError, match="no font"):
        run("--steps", "1")
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_killed_in_its_last_report_makes_it_again(run, tmp_path):
    run("--steps", "2", "--report-every", "1", "--held-out-regions", "2")
    progress, model = tmp_path / "run/progress.jsonl", tmp_path / "run/model.safetensors"
    reports, weights = progress.read_text().splitlines(keepends=True), model.read_bytes()
    progress.write_text(reports[0])
    model.unlink()
    assert run("--resume", "--held-out-regions", "2").startswith("2/2 | ")
    assert model.read_bytes() == weights
    again = [json.loads(line) for line in progress.read_text().splitlines()]
    assert [report["step"] for report in again] == [1, 2]
    assert again[1]["held_out"] == json.loads(reports[1])["held_out"]
    assert run("--resume") == ""


def test_a_run_that_was_killed_between_state_and_report_writes_it_with_its_losses(
    run, tmp_path, monkeypatch
):
    options = ("--report-every", "2", "--held-out-regions", "2")
    run("--steps", "4", *options)
    whole = (tmp_path / "run").rename(tmp_path / "whole")

    def killed(*args):
        raise SystemExit(137)

    with monkeypatch.context() as patched:
        patched.setattr("tap_deploy.training.run.run.evaluate", killed)
        with pytest.raises(SystemExit):
            run("--steps", "4", *options)
    assert not (tmp_path / "run/progress.jsonl").exists()
    run("--resume", *options)
    expected, found = (
        [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
        for folder in (whole, tmp_path / "run")
    )
    assert all(report.pop("seconds_per_step") > 0 for report in expected + found)
    assert found == expected


def test_only_the_length_of_a_run_can_change(run, tmp_path):
    run("--steps", "2", "--regions-per-picture", "3", "--held-out-regions", "2")
    config = json.loads((tmp_path / "run/training.json").read_text())
    assert config["regions_per_picture"] == 3
    with pytest.raises(
        InputError, match="--steps is 1; expected at least 2, the steps done so far"
    ):
        run("--resume", "--steps", "1")
    more = run("--resume", "--steps", "4", "--report-every", "1", "--held-out-regions", "2")
    assert [line.split()[0] for line in more.splitlines()] == ["3/4", "4/4"]
    assert json.loads((tmp_path / "run/training.json").read_text()) == config | {"steps": 4}
    assert run("--resume", "--steps", "4") == ""


def test_a_signal_asks_the_run_to_stop_and_a_second_one_is_for_the_system(run):
    for each in SIGNALS:  # a shell ignores some in the background, and nohup others
        signal.signal(each, signal.SIG_DFL)
    asked = cli.stop_on_signals()
    assert not asked()
    os.kill(os.getpid(), signal.SIGHUP)
    assert asked()
    for each in SIGNALS:
        assert signal.getsignal(each) is signal.SIG_DFL


def test_a_signal_that_nohup_ignores_stays_ignored(run):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    asked = cli.stop_on_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not asked()
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_errors_end_as_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["training", "--output", str(tmp_path), "--resume"])
    with pytest.raises(SystemExit) as ended:
        cli.train_command()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
