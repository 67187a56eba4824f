"""Steps: the GPU tests of the project in pytest; each outcome is noted at once."""

from __future__ import annotations

import collections
import os
import pathlib
import subprocess
import sys

from benchmarks.gpu.context import MICRO, Context, Notes, Skipped, StepFailed, read_json
from benchmarks.gpu.pytest_notes import VARIABLE

NOTHING_SELECTED = 5
MARK = "mark.gpu"


def run(
    context: Context,
    notes: Notes,
    file: str | None = None,
    without: str | None = None,
) -> None:
    """Run ``pytest -m gpu``, and note the outcomes.

    Args:
        context: folders of the checkout and of the bundle for tests.
        notes: notes for outcomes and counts.
        file: test file, relative to the checkout; None for all files with GPU tests.
        without: test file to leave out.

    Raises:
        Skipped: the file does not exist, or all tests were skipped.
        StepFailed: a test failed, or pytest did not finish.
    """
    files = [context.project / file] if file else _files(context.project, without)
    if not files or not all(path.exists() for path in files):
        raise Skipped(f"this checkout has no {file or 'test for a GPU'}")
    # No pythonpath of the checkout: the tree in the layout of an installation is first on the path.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-o", "pythonpath="]
    command += ["-c", str(context.project / "pyproject.toml"), "-o", "filterwarnings=default"]
    command += ["-p", "no:cacheprovider", "-p", "benchmarks.gpu.pytest_notes"]
    command += map(str, files)
    environment = {**os.environ, "TAP_REQUIRE_GPU": "1", VARIABLE: str(notes.path)}
    if (context.work / MICRO).exists():
        environment["TAP_GPU_BUNDLE"] = str(context.work / MICRO)
    # With -m, the current folder is first on the path: run in the folder with that tree.
    code = subprocess.run(command, cwd=sys.path[0] or None, env=environment).returncode
    notes.values = read_json(notes.path)
    _judge(code, notes)


def _files(project: pathlib.Path, without: str | None) -> list[pathlib.Path]:
    """Return the files with GPU tests; collecting all test files takes longer than the tests."""
    paths = sorted((project / "tests").glob("test_*.py"))
    left_out = None if without is None else project / without
    return [path for path in paths if path != left_out and MARK in path.read_text("utf-8")]


def _judge(code: int, notes: Notes) -> None:
    tests = notes.values.get("tests", [])
    counts = collections.Counter(test["outcome"] for test in tests)
    notes.put("headline", ", ".join(f"{number} {name}" for name, number in counts.items()))
    failed = [test for test in tests if test["outcome"] == "failed"]
    if failed:
        first = f"{failed[0]['test']}: {failed[0]['reason']}"
        raise StepFailed(f"{len(failed)} of {len(tests)} failed; first failure: {first}")
    if code not in (0, NOTHING_SELECTED):
        raise StepFailed(f"pytest ended with exit code {code} after {len(tests)} tests")
    if not counts["passed"]:
        raise Skipped(tests[0]["reason"] if tests else "pytest selected no test")
