"""The report: a JSON file rewritten after every step, and one line of output per step."""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
import platform
import sys
from typing import Any

from benchmarks.gpu.context import write_json
from benchmarks.gpu.runner import FAILED, PASSED, StepResult

REPORT_FILE = "gpu-report.json"
SCOPE = (
    "tap_vit_b has synthetic weights (seed 0 of the reference, or random numbers of the same mean "
    "and deviation): the amount of work is the same, but masks and captions are meaningless. "
    "Pictures are in the model frame and results in host memory, transfers included; end to end "
    "includes full-size masks, but not decoding of picture files."
)


class Report:
    """Collects results and writes them to a file."""

    def __init__(self, path: pathlib.Path, settings: dict[str, Any]) -> None:
        self._path, self._settings = path, settings
        self._date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.results: list[StepResult] = []
        self.save()

    def add(self, result: StepResult) -> None:
        """Add a result and write the file."""
        self.results.append(result)
        self.save()

    def save(self) -> None:
        """Write the file."""
        write_json(self._path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return {
            "date": self._date,
            "python": platform.python_version(),
            "command": sys.argv[1:],
            "settings": self._settings,
            "scope": SCOPE,
            "exit_code": exit_code(self.results),
            "steps": [dataclasses.asdict(result) for result in self.results],
        }


def exit_code(results: list[StepResult]) -> int:
    """Return 1 if a step failed, 2 if no GPU step passed, else 0.

    Without GPU steps, all steps count.
    """
    if any(result.status == FAILED for result in results):
        return 1
    asked = [result for result in results if result.uses_gpu] or results
    return 0 if any(result.status == PASSED for result in asked) else 2


def line(result: StepResult) -> str:
    """Return the result of a step in one line."""
    told = result.reason or headline(result.notes)
    return f"{result.step:<20} {result.status:<8} {result.seconds:6.1f} s  {told}".rstrip()


def headline(notes: dict[str, Any]) -> str:
    """Return the findings of a step in brief: its headline, else its medians or checks."""
    if "headline" in notes:
        return str(notes["headline"])
    if "stages" in notes:
        ms = (f"{stage['stage']} {stage['latency']['median_ms']:.2f}" for stage in notes["stages"])
        return ", ".join(ms) + " ms"
    checks = notes.get("checks", [])
    made = sum(check["passed"] is True for check in checks)
    return f"{made} of {len(checks)} checks passed" if checks else ""
