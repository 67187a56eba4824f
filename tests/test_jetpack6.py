"""The base package on the oldest versions that JetPack 6 allows; made by scripts/test-jetpack6."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.slow

HERE = pathlib.Path(__file__).parent
PINS = dict(
    re.findall(r"^(\w+)==(\S+)$", (HERE / "jetpack6-constraints.txt").read_text("utf-8"), re.M)
)


@pytest.fixture(scope="module")
def board_python():
    path = os.environ.get("TAP_JETPACK6_PYTHON")
    if path is None:
        pytest.skip("needs an environment of its own: run scripts/test-jetpack6")
    return path


def predict(python, bundle, picture, output):
    command = [python, HERE / "jetpack6_program.py", bundle.path, picture, output]
    # Run in another folder, so that the installed package is imported and not the sources.
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=output.parent
    )
    assert result.returncode == 0, result.stderr
    with np.load(output) as arrays:
        return json.loads(result.stdout), dict(arrays)


@pytest.fixture(scope="module")
def answers(board_python, micro_bundle, photo, tmp_path_factory):
    """Results of both environments: facts and arrays of the board's, then of this one."""
    folder = tmp_path_factory.mktemp("answers")
    board = predict(board_python, micro_bundle, photo, folder / "board.npz")
    here = predict(sys.executable, micro_bundle, photo, folder / "here.npz")
    return board, here


def test_the_versions_are_the_oldest_ones(answers):
    (facts, _), _ = answers
    assert facts["versions"] == {name.lower(): version for name, version in PINS.items()}
    assert facts["python"] == [3, 10] or sys.version_info[:2] != (3, 10)


def test_nothing_heavy_is_installed(answers):
    (facts, _), _ = answers
    assert facts["installed"] == []


def test_the_answers_are_those_of_the_development_environment(answers):
    (facts, found), (expected_facts, expected) = answers
    assert facts["captions"] == expected_facts["captions"]
    assert facts["concepts"] == expected_facts["concepts"]
    np.testing.assert_array_equal(found["caption_ids"], expected["caption_ids"])
    # Another onnxruntime sums in another order: as far apart as fp32 graphs may be from PyTorch.
    for name in ("iou_predictions", "semantic_embeddings"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-3, rtol=0)
    assert found["masks"].shape == expected["masks"].shape
    assert 0 < expected["masks"].mean() < 1
    assert (found["masks"] != expected["masks"]).mean() <= 1e-4


@pytest.mark.parametrize(
    "arguments", [["doctor", "--for", "run"], ["verify"], ["selftest"], ["inspect"]]
)
def test_commands(board_python, micro_bundle, tmp_path, arguments):
    copy = shutil.copytree(micro_bundle.path, tmp_path / "bundle")
    bundle = [] if arguments[0] == "doctor" else [copy]
    command = [pathlib.Path(board_python).with_name("tap-export"), *arguments, *bundle]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
