"""Start-up of a candidate in a fresh process: import, load, first region, peak memory.

The request is JSON on stdin, the answer JSON on stdout.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from typing import Any

from tap_deploy.errors import SessionError, TapError
from tap_deploy.machine.host import Host
from tap_deploy.machine.memory import peak_rss_bytes

PROGRAM = "tap_deploy.bench.first_region"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartUp:
    """Start-up of a process that answers one click (mask, name and caption), then a workload.

    Attributes:
        start_up_s: from the start of the process until the model is loaded, seconds.
        first_region_s: from the start of the process until the first region, seconds.
        peak_rss_bytes: peak of the resident memory of the process with the workload, bytes; on a
            Jetson it includes GPU memory.
    """

    start_up_s: float
    first_region_s: float
    peak_rss_bytes: int


def measure_start_up(
    name: str | None, setup: dict[str, Any], workload: str | None = None
) -> StartUp:
    """Start a candidate in a new process, and have it answer one click, then a workload.

    Args:
        name: a baseline; None for the bundle under test.
        setup: the ``Setup`` as JSON types.
        workload: name of the workload; None for no more than the click.

    Raises:
        SessionError: the candidate cannot be loaded, or the process failed.
    """
    start = time.time()
    result = subprocess.run(
        [sys.executable, "-m", PROGRAM],
        input=json.dumps({"name": name, "setup": setup, "workload": workload}),
        capture_output=True,
        text=True,
    )
    if result.returncode:
        died = f"{name or 'the bundle'} died in a new process, exit code {result.returncode}"
        *_, last = ["", *result.stderr.strip().splitlines()]
        raise SessionError(last or died)
    *_, answer = result.stdout.splitlines()  # packages may have printed something before
    found = json.loads(answer)
    return StartUp(
        start_up_s=found["loaded"] - start,
        first_region_s=found["answered"] - start,
        peak_rss_bytes=found["peak_rss_bytes"],
    )


def main() -> None:
    """Load a candidate, answer one click, and print the times as JSON."""
    from tap_deploy.bench.candidate import Setup
    from tap_deploy.bench.candidates import BundleCandidate, candidate_from_name
    from tap_deploy.bench.workloads import CLICK, workload

    request = json.load(sys.stdin)
    setup, name = Setup.from_dict(request["setup"]), request["name"]
    candidate = BundleCandidate(setup) if name is None else candidate_from_name(name, setup)
    loaded = time.time()
    candidate.answers(workload(CLICK, candidate.config))
    answered = time.time()
    if request["workload"] is not None:
        candidate.answers(workload(request["workload"], candidate.config))
    times = {"loaded": loaded, "answered": answered, "peak_rss_bytes": peak_rss_bytes(Host())}
    print(json.dumps(times))
    candidate.close()


if __name__ == "__main__":
    try:
        main()
    except TapError as exc:
        sys.exit(str(exc))
