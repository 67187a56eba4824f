"""The server as a user starts it: its address, its counters, its process."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from typing import IO

from prometheus_client.parser import text_string_to_metric_families

from tap_deploy.errors import TapError

END_S = 90  # to drain after SIGTERM
SETTLE_S = 15  # for keep-alive connections to end
POLL_S = 0.2
# asyncio starts the threads of its own pool one by one, when it first needs as many at a time.
POOL_THREADS = min(32, (os.cpu_count() or 1) + 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessState:
    """What a process holds.

    Attributes:
        resident_bytes: memory in use, bytes.
        files: open file descriptors.
        threads: threads.
    """

    resident_bytes: int
    files: int
    threads: int

    def within(self, other: ProcessState, *, connections: int = 0) -> bool:
        """Whether no more files and threads are there than in ``other``, plus connections."""
        threads = other.threads + POOL_THREADS
        return self.files <= other.files + connections and self.threads <= threads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A server to put under load.

    Attributes:
        address: ``http://127.0.0.1:PORT``.
        pid: its process.
    """

    address: str
    pid: int

    @property
    def host_and_port(self) -> tuple[str, int]:
        """Where it listens."""
        host, _, port = self.address.removeprefix("http://").rpartition(":")
        return host, int(port)

    def state(self) -> ProcessState:
        """Return what the process holds now."""
        process = pathlib.Path("/proc") / str(self.pid)
        pages = int((process / "statm").read_text().split()[1])
        return ProcessState(
            resident_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
            files=len(os.listdir(process / "fd")),
            threads=len(os.listdir(process / "task")),
        )

    async def freed(self, before: ProcessState, seconds: float, *, connections: int = 0) -> float:
        """Wait until the process holds no more than before; return how long, seconds.

        Raises:
            TapError: it still holds more after ``seconds``.
        """
        start = time.monotonic()
        while not (state := self.state()).within(before, connections=connections):
            if time.monotonic() > start + seconds:
                raise TapError(
                    f"after {seconds:g} s the server holds {state.files} files and {state.threads} "
                    f"threads; it had {before.files} and {before.threads}"
                )
            await asyncio.sleep(POLL_S)
        return time.monotonic() - start

    def counters(self) -> dict[tuple[str, str], float]:
        """Return the sums and counts of all stages by (name, stage), from ``/metrics``."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=30) as response:
            families = text_string_to_metric_families(response.read().decode())
        return {
            (sample.name, sample.labels["stage"]): sample.value
            for family in families
            for sample in family.samples
            if "stage" in sample.labels and "le" not in sample.labels
        }


def serve_command(bundle: pathlib.Path, *options: str) -> list[str]:
    """Return ``tap-export serve`` on a free port."""
    return [sys.executable, "-m", "tap_deploy", "serve", str(bundle), "--port", "0", *options]


@contextlib.contextmanager
def started(command: Sequence[str]) -> Iterator[Target]:
    """Start a server, which prints its address, and end it after the block.

    Raises:
        TapError: it did not start, or did not end with exit code 0; with the end of its log.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()  # printed once the model is loaded
            if not line.startswith("serving "):
                raise TapError(f"the server did not start: {_last_line(log)}")
            yield Target(address=line.split()[-1], pid=process.pid)
            process.terminate()
            if process.wait(END_S) != 0:
                raise TapError(f"the server ended with {process.returncode}: {_last_line(log)}")
        finally:
            process.kill()
            process.communicate()


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    return lines[-1] if lines else "its log is empty"
