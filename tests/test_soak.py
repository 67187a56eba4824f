"""Short forms of ``scripts/soak``; for kills and full disks, see the tests with these names."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys

import pytest

from tests.test_errors import PROJECT

COMMAND = [sys.executable, "-m", "tests.soak.predict"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_predictions_in_threads(micro_bundle):
    """Answers are those of one thread. The memory of so few predictions is no proof of a leak."""
    options = ["--bundle", str(micro_bundle.path), "--predicts", "128", "--settled", "64"]
    result = subprocess.run([*COMMAND, *options], capture_output=True, text=True, cwd=PROJECT)
    *rows, last = result.stdout.splitlines()
    assert len(rows) == 2, result.stderr
    found = re.fullmatch(
        r"128 predictions in 4 threads and \d+ s: (\d+) wrong answers, memory grew by (\S+) % "
        r"after the first 64",
        last,
    )
    assert found is not None, last
    assert int(found[1]) == 0
    assert float(found[2]) < 15
    assert result.returncode == int(float(found[2]) > 2)


def test_a_wrong_answer_is_found(micro_bundle, monkeypatch):
    from tests.soak import predict

    digest_of, calls = predict.digest_of, []

    def differs(answer):
        calls.append(answer)
        return digest_of(answer) if len(calls) != len(predict.cases()) + 5 else "another"

    monkeypatch.setattr(predict, "digest_of", differs)
    figures = predict.soak(micro_bundle.path, predicts=8, threads=2, settled=8)
    assert figures.wrong == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_a_thread_that_fails_ends_the_soak(micro_bundle, monkeypatch, threads):
    from tests.soak import predict

    digest_of, calls = predict.digest_of, []

    def fails(answer):
        calls.append(answer)
        if len(calls) == len(predict.cases()) + 5:
            raise RuntimeError("crashed")
        return digest_of(answer)

    monkeypatch.setattr(predict, "digest_of", fails)
    with pytest.raises(RuntimeError, match="crashed"):
        predict.soak(micro_bundle.path, predicts=12, threads=threads, settled=12)


def test_a_disk_that_never_was_full_is_found(tmp_path, monkeypatch):
    from tests.soak import disk, kills

    monkeypatch.setattr(disk, "room_left", lambda disk, num_bytes: contextlib.nullcontext())
    monkeypatch.setattr(disk, "check_bundle", lambda folder: None)

    class Place:
        folder = tmp_path

        def start(self, arguments):
            return subprocess.Popen([sys.executable, "-c", ""], stderr=subprocess.PIPE)

        def check(self, attack):
            pass

    with pytest.raises(AssertionError, match="convert was never refused"):
        disk.fill(tmp_path, Place(), kills.ATTACKS["convert"], 100)


@pytest.mark.parametrize("name", ["kills", "disk", "predict"])
def test_each_has_help(name):
    command = [sys.executable, "-m", f"tests.soak.{name}", "--help"]
    assert "Options:" in subprocess.run(command, capture_output=True, text=True, cwd=PROJECT).stdout
