"""Fuzzes one target in this process, which may crash: see ``tests/soak/fuzz.py``.

python -m tests.soak.fuzz_worker TARGET SEED SECONDS [--atheris]   in an empty folder
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable

GUIDED = "--atheris" in sys.argv
MEMORY_BYTES = 4 << 30  # more than a process has after loading its libraries
NUM_BEGINNINGS = 100  # inputs that atheris begins with

if GUIDED:
    import atheris

    with atheris.instrument_imports(include=["tap_deploy"]):
        from tests.fuzz_targets import SECONDS, TARGETS
else:
    from tests.fuzz_targets import SECONDS, TARGETS

from tests.hostile import patience


def main(name: str, seed: int, seconds: float) -> None:
    folder, target = pathlib.Path.cwd(), TARGETS[name]
    target.check(target.make(random.Random(seed)), folder)  # loads what is loaded once
    used = int(pathlib.Path("/proc/self/statm").read_text("utf-8").split()[0]) * os.sysconf(
        "SC_PAGE_SIZE"
    )
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    count = 0

    def attempt(content: bytes) -> None:
        nonlocal count
        pathlib.Path("last").write_bytes(content)
        pathlib.Path("count").write_text(str(count), "utf-8")
        count += 1
        try:
            with patience(SECONDS):
                target.check(content, folder)
        except Exception as exc:
            place = " < ".join(
                f"{pathlib.Path(frame.filename).name}:{frame.lineno}"
                for frame in reversed(traceback.extract_tb(exc.__traceback__)[-4:])
            )
            kept = pathlib.Path(f"found-{count}")
            kept.write_bytes(content)
            print("FOUND", kept, repr(exc)[:300].replace("\n", " "), place, flush=True)

    if GUIDED:
        _guided(attempt, name, seed, seconds)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        attempt(target.make(random.Random(seed + count)))


def _guided(attempt: Callable[[bytes], None], name: str, seed: int, seconds: float) -> None:
    corpus = pathlib.Path("corpus")
    corpus.mkdir()
    for number in range(NUM_BEGINNINGS):
        content = TARGETS[name].make(random.Random(seed + number))
        (corpus / str(number)).write_bytes(content)
    limits = (f"-max_total_time={int(seconds)}", f"-seed={seed + 1}", "-max_len=100000")
    atheris.Setup([sys.argv[0], *limits, "-rss_limit_mb=0", str(corpus)], attempt)
    with contextlib.suppress(SystemExit):
        atheris.Fuzz()  # ends the process
    sys.exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
