"""Hostile files and command lines, at random: the law of ``tests/fuzz_targets.py`` must hold.

python -m tests.soak.fuzz [--minutes 10] [--seed 0] [--only TARGET]… [--atheris]

Each target runs in a process of its own with a limit of memory, so that a crash of a library, a
hang and a bomb are findings, too. Inputs that broke the law are kept in build/fuzz.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import click

from tap_deploy.console.exits import CleanExits
from tests import micro_files
from tests.fuzz_targets import TARGETS

FINDINGS = pathlib.Path("build/fuzz").absolute()
ROUND_SECONDS = 30


@click.command(cls=CleanExits)
@click.option("--minutes", type=click.FloatRange(min=0.1), default=10, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first input.")
@click.option("--only", multiple=True, type=click.Choice(list(TARGETS)), help="Repeatable.")
@click.option("--atheris", is_flag=True, help="Guided by coverage; pip install atheris.")
def main(minutes: float, seed: int, only: tuple[str, ...], atheris: bool) -> int:
    """Fuzz all targets in turn and print what was found; exit code 1 after a finding."""
    if atheris and importlib.util.find_spec("atheris") is None:
        raise click.UsageError("--atheris needs: pip install atheris")
    seeds = dict.fromkeys(only or TARGETS, seed)
    findings: dict[str, list[str]] = {name: [] for name in seeds}
    with tempfile.TemporaryDirectory() as folder:
        bundle = pathlib.Path(folder, "bundle")
        micro_files.make_bundle(bundle)
        end = time.monotonic() + 60 * minutes
        share = min(ROUND_SECONDS, 60 * minutes / len(seeds))
        while time.monotonic() < end:
            for name in seeds:
                done, found = _round(name, seeds[name], bundle, share, atheris)
                seeds[name] += done
                findings[name] += found
                click.echo(f"{name}: {seeds[name] - seed} inputs, {len(findings[name])} findings")
    click.echo(f"\n{'target':26}{'inputs':>10}{'findings':>10}")
    for name, last in seeds.items():
        click.echo(f"{name:26}{last - seed:10}{len(findings[name]):10}")
        for text in findings[name]:
            click.echo(f"  {text}")
    click.echo(f"{'total':26}{sum(seeds.values()) - seed * len(seeds):10}", nl=False)
    click.echo(f"{sum(map(len, findings.values())):10}")
    return int(any(findings.values()))


def _round(
    name: str, seed: int, bundle: pathlib.Path, seconds: float, atheris: bool
) -> tuple[int, list[str]]:
    """Fuzz one target in a new process; returns the number of inputs, and the findings."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "tests.soak.fuzz_worker", name, str(seed), str(seconds)]
        path = os.pathsep.join((os.getcwd(), os.environ.get("PYTHONPATH", "")))
        environment = {**os.environ, "TAP_FUZZ_BUNDLE": str(bundle), "PYTHONPATH": path}
        log = pathlib.Path(folder, "log")
        with log.open("w") as file:
            ended = subprocess.run(
                [*words, *(["--atheris"] if atheris else [])],
                cwd=folder,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        lines = log.read_text("utf-8", errors="replace").splitlines()
        count = pathlib.Path(folder, "count")
        done = int(count.read_text("utf-8")) + 1 if count.is_file() else 0
        found = [line.removeprefix("FOUND ") for line in lines if line.startswith("FOUND ")]
        if ended.returncode:
            shutil.copyfile(pathlib.Path(folder, "last"), pathlib.Path(folder, f"found-{done}"))
            found.append(f"found-{done} ended the process with {ended.returncode}: {lines[-1:]}")
        for kept in pathlib.Path(folder).glob("found-*"):
            FINDINGS.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(kept, FINDINGS / f"{name.replace(' ', '-')}-{seed}-{kept.name}")
        return done, found


if __name__ == "__main__":
    main()
