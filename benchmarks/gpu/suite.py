"""Steps: tests of the project, run by pytest, with its counts."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as xml

from benchmarks.gpu.context import MICRO, Context, Notes, Skipped, StepFailed

COUNTS = ("tests", "failures", "errors", "skipped")


def run(context: Context, notes: Notes, file: str = "tests", k: str | None = None) -> None:
    """Run ``pytest -m gpu`` on a file or folder, and note what came of it.

    Raises:
        Skipped: there is no such file, or every test skipped itself.
        StepFailed: a test failed, or pytest did not come to its end.
    """
    if not (context.project / file).exists():
        raise Skipped(f"this checkout has no {file}")
    report = context.logs / f"pytest-{k or 'gpu'}.xml"
    command = [sys.executable, "-m", "pytest", str(context.project / file), "-m", "gpu", "-v"]
    command += ["-c", str(context.project / "pyproject.toml"), "-p", "no:cacheprovider"]
    # Not the sources as they lie in the checkout: first on the path is the tree as installed.
    command += ["-o", "pythonpath=", "-o", "filterwarnings=default", f"--junitxml={report}"]
    command += ["-k", k] if k else []
    environment = {**os.environ, "TAP_REQUIRE_GPU": "1"}
    if (context.work / MICRO).exists():
        environment["TAP_GPU_BUNDLE"] = str(context.work / MICRO)
    # The first entry of the path is its folder under -m: the view, which holds all of it.
    result = subprocess.run(command, cwd=sys.path[0] or None, env=environment)
    _judge(result.returncode, report, notes)


def _judge(code: int, report: object, notes: Notes) -> None:
    try:
        suites = list(xml.parse(str(report)).getroot().iter("testsuite"))
    except (OSError, xml.ParseError):
        raise StepFailed(f"pytest ended with exit code {code}, without a report") from None
    counts = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in COUNTS}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    cases = [case for suite in suites for case in suite.iter("testcase")]
    notes.put("counts", {"passed": passed, **counts})
    notes.put("slowest_s", _slowest(cases))
    notes.put("failed", [_name(c) for c in cases if _has(c, "failure") or _has(c, "error")])
    notes.put("reasons_to_skip", _reasons(cases))
    notes.put("headline", f"{passed} passed, {counts['skipped']} skipped")
    if code not in (0, 5):
        names = ", ".join(notes.values["failed"][:5]) or "none"
        raise StepFailed(f"{counts['failures'] + counts['errors']} of {counts['tests']}: {names}")
    if not passed:
        reasons = notes.values["reasons_to_skip"]
        raise Skipped(next(iter(reasons), "pytest selected no test"))


def _reasons(cases: list[xml.Element]) -> dict[str, int]:
    reasons: dict[str, int] = {}
    for skipped in (found for case in cases for found in case.iter("skipped")):
        text = skipped.get("message", "")
        reasons[text] = reasons.get(text, 0) + 1
    return reasons


def _slowest(cases: list[xml.Element]) -> dict[str, float]:
    times = sorted(((float(c.get("time", 0)), _name(c)) for c in cases), reverse=True)
    return {name: seconds for seconds, name in times[:10]}


def _has(case: xml.Element, kind: str) -> bool:
    return case.find(kind) is not None


def _name(case: xml.Element) -> str:
    return f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"
