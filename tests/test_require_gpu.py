"""``TAP_REQUIRE_GPU`` fails a run with only skipped tests."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TESTS = """
import pytest

@pytest.mark.gpu
def test_a():
    {}

def test_without_a_gpu():
    pass
"""


@pytest.mark.parametrize(
    ("body", "required", "code"),
    [
        ("pytest.skip('no NVIDIA GPU')", "1", 1),
        ("pytest.skip('no NVIDIA GPU')", "0", 0),
        ("pytest.skip('no NVIDIA GPU')", "", 0),
        ("pass", "1", 0),
        ("assert False", "1", 1),
    ],
)
def test_a_run_that_used_no_gpu(tmp_path, body, required, code):
    (tmp_path / "test_it.py").write_text(TESTS.format(body))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.require_gpu", str(tmp_path)],
        env=os.environ | {"TAP_REQUIRE_GPU": required, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    complains = "no test used a GPU" in done.stdout
    assert complains == (code == 1 and "skip" in body)
