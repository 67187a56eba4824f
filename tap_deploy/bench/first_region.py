"""Start-up of a candidate in a fresh process: import, load, first region, peak memory.

The request is JSON on stdin, the answer JSON on stdout.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
import time
from typing import Any

from tap_deploy.errors import SessionError, TapError

PROGRAM = "tap_deploy.bench.first_region"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartUp:
    """Start-up of a process that answers one click: mask, name and caption.

    Attributes:
        start_up_s: from the start of the process until the model is loaded, seconds.
        first_region_s: from the start of the process until the first region, seconds.
        peak_rss_bytes: peak of the resident memory of the process, bytes; on a Jetson it includes
            GPU memory.
    """

    start_up_s: float
    first_region_s: float
    peak_rss_bytes: int


def measure_start_up(name: str | None, setup: dict[str, Any]) -> StartUp:
    """Start a candidate in a new process, and have it answer one click.

    Args:
        name: a baseline; None for the bundle under test.
        setup: the ``Setup`` as JSON types.

    Raises:
        SessionError: the candidate cannot be loaded, or the process failed.
    """
    start = time.time()
    result = subprocess.run(
        [sys.executable, "-m", PROGRAM],
        input=json.dumps({"name": name, "setup": setup}),
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
    times = {"loaded": loaded, "answered": time.time(), "peak_rss_bytes": peak_rss_bytes()}
    print(json.dumps(times))
    candidate.close()


def peak_rss_bytes() -> int:
    """Return the peak of the resident memory of this process, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    try:
        main()
    except TapError as exc:
        sys.exit(str(exc))
