"""``python -m benchmarks.serve BUNDLE -o results.json``: all of it, and its exit code."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
import io
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import click
from PIL import Image

from benchmarks.serve.attacks import deaf_clients, half_bodies, regions_request, slow_heads
from benchmarks.serve.clients import connected
from benchmarks.serve.exam import Exam, Tally
from benchmarks.serve.hostile import under_attack
from benchmarks.serve.overload import Load, overload
from benchmarks.serve.tables import attack_table, overload_table, throughput_table
from benchmarks.serve.target import Target, serve_command, started
from benchmarks.serve.throughput import Turns, throughput
from benchmarks.serve.uploads import many_uploads
from tap_deploy.bench.conditions import conditions
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.console.exits import CleanExits
from tap_deploy.console.options import FILE, bundle_argument, runtime_options
from tap_deploy.machine.host import Host
from tap_deploy.predictor import TapPredictor
from tap_deploy.server.images import embedding_bytes
from tap_deploy.server.options import MIB, ServeOptions
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.storage.files import atomic_file, check_file_output

PARTS = ("throughput", "overload", "hostile")
PACKAGES = ("aiohttp", "fastapi", "h11", "prometheus-client", "uvicorn")
BATCHED, ALONE = "--max-batch 32", "--max-batch 1"
# For the attacks: a deadline that they do not make longer than needed, and few pictures.
TIMEOUT_S, KEPT, UPLOADS = 20, 32, 1000
LORIS = 200
SILENT, CLOSED = 100, 100
DEAF_GETS, DEAF_POSTS = 48, 8
BIG_SIDE, BIG_REGIONS = 3000, 64  # pixels and regions of an answer of some MB


@click.command(cls=CleanExits)
@bundle_argument
@runtime_options
@click.option("-o", "--output", type=FILE, required=True, help="JSON file for all figures.")
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="Part to run; repeatable.")
@click.option("--turns", type=click.IntRange(1), default=Turns.turns, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1), default=Turns.seconds, show_default=True)
@click.option("--overload-seconds", type=click.FloatRange(1), default=60.0, show_default=True)
def main(
    bundle: str,
    run_on: RunOn,
    output: pathlib.Path,
    only: tuple[str, ...],
    turns: int,
    seconds: float,
    overload_seconds: float,
) -> int:
    """Put tap-export serve BUNDLE under load, over the loopback interface of this machine.

    Exits with 1 if an answer is wrong, a request that had to be refused was not, or the server
    keeps memory, connections or threads. Times are measured, and never a reason to fail.
    """
    check_file_output(output, force=True)
    opened = Bundle.open(bundle)
    settings = {"turns": turns, "seconds": seconds, "overload_seconds": overload_seconds}
    report: dict[str, Any] = {"conditions": _conditions(opened, run_on, settings)}
    with TapPredictor.from_bundle(opened.path, **dataclasses.asdict(run_on)) as predictor:
        bench = Bench(opened.path, run_on, predictor, Exam.of(predictor))
        if "throughput" in (only or PARTS):
            report["throughput"] = bench.throughput(Turns(turns=turns, seconds=seconds))
            click.echo(throughput_table(report["throughput"]))
        if "overload" in (only or PARTS):
            report["overload"] = bench.overload(Load(seconds=overload_seconds))
            click.echo(overload_table(report["overload"]))
        if "hostile" in (only or PARTS):
            report["hostile"] = list(bench.hostile())
            click.echo(attack_table(report["hostile"]))
    failures = list(failures_of(report))
    with atomic_file(output) as partial:
        text = json.dumps(report | {"failures": failures}, indent=1)
        partial.write_text(text + "\n", "utf-8")
    for line in failures:
        click.echo(f"failed: {line}")
    return 1 if failures else 0


class Bench:
    """Starts servers for a bundle, and measures them.

    Args:
        bundle: its folder.
        run_on: backend and precision, of servers and predictor.
        predictor: the same bundle in this process.
        exam: questions with its answers.
    """

    def __init__(
        self, bundle: pathlib.Path, run_on: RunOn, predictor: TapPredictor, exam: Exam
    ) -> None:
        self._bundle, self._predictor, self._exam = bundle, predictor, exam
        threads = [] if run_on.threads is None else ["--threads", str(run_on.threads)]
        self._words = [*run_on.words, *threads]

    def throughput(self, turns: Turns) -> list[dict[str, Any]]:
        """Measure throughput, with and without batches."""
        commands = [self._command(*words.split()) for words in (BATCHED, ALONE)]
        with started(commands[0]) as batched, started(commands[1]) as alone:
            targets = {BATCHED: batched, ALONE: alone}
            return list(throughput(targets, self._predictor, self._exam.clicks(), turns, _tell))

    def overload(self, load: Load) -> dict[str, Any]:
        """Offer too much to a server with the default options."""
        _tell("overload")
        with started(self._command()) as target:
            return asyncio.run(overload(target, self._exam, load))

    def hostile(self) -> Iterator[dict[str, Any]]:
        """Attack a server."""
        cache_mb = math.ceil(KEPT * embedding_bytes(self._predictor.config) / MIB)
        kept = cache_mb * MIB // embedding_bytes(self._predictor.config)
        options = ("--cache-mb", str(cache_mb), "--timeout-s", str(TIMEOUT_S))
        waits_s = ServeOptions.body_timeout_s
        with started(self._command(*options)) as target:
            big = asyncio.run(_big_request(target, self._exam))
            attacks = {
                "slow heads": slow_heads(LORIS, waits_s),
                "half bodies": half_bodies(SILENT, CLOSED, waits_s),
                "answers that nobody reads": deaf_clients(DEAF_GETS, DEAF_POSTS, big, TIMEOUT_S),
                "1,000 uploads": many_uploads(self._exam, UPLOADS, kept),
            }
            for name, attack in attacks.items():
                _tell(name)
                yield asyncio.run(under_attack(name, attack, target, self._exam))

    def _command(self, *options: str) -> list[str]:
        return serve_command(self._bundle, *self._words, *options)


async def _big_request(target: Target, exam: Exam) -> bytes:
    """Upload a large picture; return a request with an answer of some MB."""
    with Image.open(io.BytesIO(exam.pictures[0])) as picture, io.BytesIO() as content:
        picture.resize((BIG_SIDE, BIG_SIDE)).save(content, "PNG")
        async with connected(target, exam) as client:
            image_id = await client.upload(content.getvalue())
    whole = {"box": [0, 0, BIG_SIDE - 1, BIG_SIDE - 1]}
    return regions_request(image_id, [whole] * BIG_REGIONS)


def _conditions(bundle: Bundle, run_on: RunOn, settings: dict[str, Any]) -> dict[str, Any]:
    found = conditions(bundle, run_on, settings, Host())
    found["versions"] |= {name: importlib.metadata.version(name) for name in PACKAGES}
    return found


def failures_of(report: dict[str, Any]) -> Iterator[str]:
    """Yield what was wrong, a line each."""
    for row in report.get("throughput", []):
        refused = {status: count for status, count in row["statuses"].items() if status != "200"}
        if refused:
            yield f"{row['work']}, {row['clients']} clients: answered with {refused}"
        differences = Tally(**row["differences"])
        if differences.wrong:
            yield f"{row['work']}, {row['clients']} clients: {differences}"
    yield from report.get("overload", {}).get("failures", [])
    for attack in report.get("hostile", []):
        yield from attack["failures"]


def _tell(what: str) -> None:
    click.echo(what, err=True)


if __name__ == "__main__":
    main()
