"""``TAP_REQUIRE_GPU=1``: fail a test run in which no test used a GPU.

Tests of engines that cannot run are skipped, and a run with only skipped tests would pass.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

VARIABLE = "TAP_REQUIRE_GPU"


class RequireGpu:
    def __init__(self) -> None:
        self.ran = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and "gpu" in report.keywords and not report.skipped:
            self.ran += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self.ran:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.ran:
            terminalreporter.write_line(
                f"error: {VARIABLE} is set and no test used a GPU; see why they were skipped",
                red=True,
            )


def pytest_configure(config: pytest.Config) -> None:
    in_a_worker = hasattr(config, "workerinput")  # of xdist; the reports come to the controller
    if os.environ.get(VARIABLE, "0") not in ("", "0") and not in_a_worker:
        config.pluginmanager.register(RequireGpu())
