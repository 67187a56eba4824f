"""Pytest plugin that writes the outcome of every test to the notes at once."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from benchmarks.gpu.context import write_json

VARIABLE = "TAP_GPU_NOTES"
_kept: list[dict[str, Any]] = []


def pytest_runtest_logreport(report: Any) -> None:
    """Note the outcome of a test's call, and of setup or teardown if they did not pass."""
    if report.when == "call" or report.outcome != "passed":
        found = {
            "test": report.nodeid.split("/")[-1],
            "outcome": report.outcome,
            "seconds": round(report.duration, 2),
        }
        if report.outcome != "passed":
            found["reason"] = _why(report)
        _kept.append(found)
        write_json(pathlib.Path(os.environ[VARIABLE]), {"tests": _kept})


def _why(report: Any) -> str:
    if isinstance(report.longrepr, tuple):  # file, line and reason of a skip
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).strip().split("\n")[0][:300]
