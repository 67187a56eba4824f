"""Steps: tests of the project, run by pytest, each outcome kept at once."""

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
    k: str | None = None,
    without: str | None = None,
) -> None:
    """Run ``pytest -m gpu``, and note what came of it.

    Args:
        context: where the checkout is, and the bundle that tests may use.
        notes: take outcomes and counts.
        file: of the checkout; None for all test files that have such tests.
        k: as pytest's ``-k``.
        without: a file that is left out.

    Raises:
        Skipped: there is no such file, or every test skipped itself.
        StepFailed: a test failed, or pytest did not come to its end.
    """
    files = [context.project / file] if file else _files(context.project, without)
    if not files or not all(path.exists() for path in files):
        raise Skipped(f"this checkout has no {file or 'test for a GPU'}")
    # Not the sources as they lie in the checkout: first on the path is the tree as installed.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-o", "pythonpath="]
    command += ["-c", str(context.project / "pyproject.toml"), "-o", "filterwarnings=default"]
    command += ["-p", "no:cacheprovider", "-p", "benchmarks.gpu.pytest_notes"]
    command += [*(["-k", k] if k else []), *map(str, files)]
    environment = {**os.environ, "TAP_REQUIRE_GPU": "1", VARIABLE: str(notes.path)}
    if (context.work / MICRO).exists():
        environment["TAP_GPU_BUNDLE"] = str(context.work / MICRO)
    # Under -m the current folder is the first entry of the path: the view, which holds all of it.
    code = subprocess.run(command, cwd=sys.path[0] or None, env=environment).returncode
    notes.values = read_json(notes.path)
    _judge(code, notes)


def _files(project: pathlib.Path, without: str | None) -> list[pathlib.Path]:
    """Return the files with tests for a GPU: to collect all of them takes longer than to run."""
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
        raise StepFailed(f"{len(failed)} of {len(tests)} failed, first {first}")
    if code not in (0, NOTHING_SELECTED):
        raise StepFailed(f"pytest ended with exit code {code} after {len(tests)} tests")
    if not counts["passed"]:
        raise Skipped(tests[0]["reason"] if tests else "pytest selected no test")
