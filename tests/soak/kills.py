"""Commands that are killed (SIGKILL) at random moments: nothing wrong is loaded, no litter stays.

python -m tests.soak.kills [--minutes 10] [--seed 0] [--only NAME] [--bundle FOLDER]
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import click
from PIL import Image

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.manifest import MANIFEST_NAME
from tap_deploy.bundle.plans import cached_record
from tap_deploy.console.exits import CleanExits
from tap_deploy.errors import BundleError
from tap_deploy.storage.folder_lock import LOCK_NAME
from tap_deploy.storage.unfinished import temporary_folder
from tests.micro_files import CONFIG, DATA, make_bundle

POLL_SECONDS = 0.01
RERUN_EVERY = 6  # kills between two runs to the end


@dataclasses.dataclass(kw_only=True)
class Attack:
    """A command, the folder that it works in, and what was counted.

    Attributes:
        name: name of the command.
        arguments: its command line, for a working folder ``{}``.
        results: files, below the working folder, that the command makes; the last part is a
            pattern.
        beside: another command that changes the same bundle meanwhile, and is not killed.
        changes: changes of the working folder in a run to the end.
        seconds: duration of a run to the end.
        kills, checks, finished: killed processes, checked bundles, runs that were not killed.
        left: files that were there after a kill, and gone after the next run to the end.
    """

    name: str
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    beside: tuple[str, ...] = ()
    changes: int = 0
    seconds: float = 0.0
    kills: int = 0
    checks: int = 0
    finished: int = 0
    left: int = 0


BUNDLE, OUTPUT = "{}/bundle", "{}/output"
QUANTIZE = ("quantize", BUNDLE, "--calibration-data", "{}/pictures", "--no-verdict", "--force")
CONVERT = ("convert", BUNDLE, "--precision", "fp16", "--force")
BUILD = ("build", BUNDLE, "--backend", "tensorrt_rtx", "--precision", "fp32")
ATTACKS = {
    "export": Attack(
        name="export",
        arguments=(
            *("export", "--config", "{}/config.json", "--synthetic-weights", "0"),
            *("-o", OUTPUT, "--force"),
        ),
        results=("output/*",),
    ),
    "convert": Attack(name="convert", arguments=CONVERT, results=("bundle/onnx/fp16/*",)),
    "quantize": Attack(
        name="quantize",
        arguments=(*QUANTIZE, "--smoothquant", "on"),
        results=("bundle/onnx/int8*/*", "bundle/calibration/*", "bundle/reports/*"),
    ),
    "build": Attack(
        name="build",
        arguments=(*BUILD, "--compute-capability", "86", "--force"),
        results=("bundle/engines/*/*",),
    ),
    "run": Attack(
        name="run",
        arguments=(
            *("run", BUNDLE, "{}/pictures", "--box", "10,10,60,60", "-o", OUTPUT),
            *("--overlays", "--force"),
        ),
        results=("output/*",),
    ),
    "convert beside quantize": Attack(
        name="convert beside quantize",
        arguments=CONVERT,
        beside=QUANTIZE,
        results=("bundle/onnx/*/*", "bundle/calibration/*", "bundle/reports/*"),
    ),
}


class Place:
    """The working folder of an attack, with a bundle and pictures, and ``TMPDIR``."""

    def __init__(self, folder: pathlib.Path, bundle: pathlib.Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        shutil.copytree(bundle, folder / "bundle")
        shutil.copyfile(bundle.parent / "config.json", folder / "config.json")
        (folder / "tmp").mkdir()
        (folder / "pictures").mkdir()
        with Image.open(DATA / "coffee.jpg") as photo:
            for left in range(0, 300, 60):
                photo.crop((left, 0, left + 200, 150)).save(folder / "pictures" / f"{left}.png")
        self.given = self.files()

    def files(self) -> set[str]:
        """Return all files and links, by relative path, except locks of bundles."""
        found = set()
        for parent, _, names in os.walk(self.folder):
            found |= {os.path.relpath(os.path.join(parent, name), self.folder) for name in names}
        return {name for name in found if not name.endswith(LOCK_NAME)}

    def start(self, arguments: tuple[str, ...]) -> subprocess.Popen[str]:
        """Start ``tap-export``."""
        words = [each.replace("{}", str(self.folder)) for each in arguments]
        return subprocess.Popen(
            [sys.executable, "-m", "tap_deploy", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(self.folder / "tmp"), "OMP_NUM_THREADS": "1"},
        )

    def check(self, attack: Attack) -> None:
        """Check every bundle and result: each is whole, or there is none.

        Raises:
            AssertionError: one loads but is wrong.
        """
        for name in ("bundle", "output"):
            if (self.folder / name / MANIFEST_NAME).exists():
                check_bundle(self.folder / name)
                attack.checks += 1
        assert (self.folder / "bundle" / MANIFEST_NAME).exists(), "the bundle is gone"
        for path in (self.folder / "output").glob("*.json"):
            if path.name != MANIFEST_NAME:
                json.loads(path.read_text("utf-8"))
        for path in (self.folder / "output").glob("*.png"):
            with Image.open(path) as picture:
                picture.load()


def check_bundle(folder: pathlib.Path) -> None:
    """Check that a bundle opens, and that its engines are whole or do not load."""
    bundle = Bundle.open(folder)  # the SHA-256 of every file
    for variant in bundle.manifest.graphs:
        bundle.variant(variant)
    for path in folder.glob("engines/*/*.json"):
        record = json.loads(path.read_text("utf-8"))
        plan = path.with_suffix(".plan")
        assert cached_record(path.parent, path.stem, record["key"]), f"{plan} is not its record's"


def end_of(process: subprocess.Popen[str], seconds: float = 600) -> tuple[int, str]:
    """Wait for a process; returns its exit code and what it said."""
    _, errors = process.communicate(timeout=seconds)
    return process.returncode, errors


def run_to_the_end(place: Place, attack: Attack) -> None:
    """Run the command, check its results, and that nothing else is there.

    Raises:
        AssertionError: it failed, or litter stays.
    """
    before, started = place.files(), time.monotonic()
    process, changes, seen = place.start(attack.arguments), 0, before
    while process.poll() is None:
        now = place.files()
        changes, seen = changes + (now != seen), now
        time.sleep(POLL_SECONDS)
    code, errors = end_of(process)
    assert code == 0, f"{attack.name} ended with {code}: {errors}"
    if attack.beside:
        code, errors = end_of(place.start(attack.beside))
        assert code == 0, f"{attack.name} ended with {code}: {errors}"
    attack.changes = attack.changes or changes
    attack.seconds = attack.seconds or time.monotonic() - started
    place.check(attack)
    after = place.files()
    attack.left += len(before - after)
    results = {
        path.relative_to(place.folder).as_posix()
        for pattern in attack.results
        for path in place.folder.glob(pattern)
    }
    litter = {
        name
        for name in after - place.given
        if "partial-" in name
        or not any(name == each or name.startswith(f"{each}/") for each in results)
    }
    assert not litter, f"{attack.name} leaves {sorted(litter)}"


def kill_once(place: Place, attack: Attack, rng: random.Random) -> None:
    """Start the command and kill it, at any time or after some change of its folder."""
    other = place.start(attack.beside) if attack.beside else None
    process, deadline = place.start(attack.arguments), time.monotonic() + attack.seconds
    if rng.random() < 0.5:
        deadline = time.monotonic() + rng.uniform(0, attack.seconds)
        changes = sys.maxsize
    else:
        changes = rng.randint(1, attack.changes + 1)
    seen = place.files()
    while process.poll() is None and time.monotonic() < deadline and changes > 0:
        time.sleep(POLL_SECONDS)
        now = place.files()
        changes, seen = changes - (now != seen), now
    process.kill()
    code, _ = end_of(process)
    attack.kills += code == -9
    attack.finished += code == 0
    place.check(attack)
    if other is not None:
        code, errors = end_of(other)
        said = "another command" in errors  # the graphs that it used were replaced
        assert code == 0 or (code == 2 and said), f"{attack.beside[0]} ended with {code}: {errors}"
        place.check(attack)


def attacks(names: tuple[str, ...]) -> Iterator[Attack]:
    """Yield the attacks; engines are left out where their builder is missing."""
    for name, attack in ATTACKS.items():
        if names and name not in names:
            continue
        if name == "build" and not _has_builder():
            click.echo("build is left out: no tensorrt_rtx here", err=True)
            continue
        yield attack


def _has_builder() -> bool:
    import importlib.util

    return importlib.util.find_spec("tensorrt_rtx") is not None


def prepare(folder: pathlib.Path, bundle: pathlib.Path | None) -> None:
    """Copy the bundle of the micro model, or make one, and write the config beside it."""
    if bundle is None:
        make_bundle(folder)
    else:
        shutil.copytree(bundle, folder)
    config = json.loads(CONFIG.read_text("utf-8"))["config"]
    folder.with_name("config.json").write_text(json.dumps(config), "utf-8")


def attack_options(command: Callable[..., int]) -> Callable[..., int]:
    """Add the options that choose attacks and what is attacked."""
    only = click.option(
        "--only", multiple=True, type=click.Choice(list(ATTACKS)), help="Only this command."
    )
    bundle = click.option(
        "--bundle",
        type=click.Path(path_type=pathlib.Path),
        help="A bundle of the micro model; default: make one.",
    )
    return only(bundle(command))


@click.command("kills", cls=CleanExits)
@click.option("--minutes", type=click.FloatRange(min=0), default=10.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@attack_options
def main(minutes: float, seed: int, only: tuple[str, ...], bundle: pathlib.Path | None) -> int:
    """Kill commands at random moments, for some minutes; exit with 1 if anything is wrong."""
    rng = random.Random(seed)
    with temporary_folder() as folder:
        prepare(folder / "tap_micro", bundle)
        chosen = list(attacks(only))
        places = [Place(folder / str(index), folder / "tap_micro") for index in range(len(chosen))]
        try:
            for attack, place in zip(chosen, places, strict=True):
                run_to_the_end(place, attack)
                click.echo(f"{attack.name}: {attack.seconds:.1f} s to the end", err=True)
            ends = time.monotonic() + 60 * minutes
            while time.monotonic() < ends:
                for attack, place in zip(chosen, places, strict=True):
                    kill_once(place, attack, rng)
                    if attack.kills % RERUN_EVERY == 0:
                        run_to_the_end(place, attack)
                kills = sum(attack.kills for attack in chosen)
                click.echo(f"{kills} killed, nothing wrong so far", err=True)
            for attack, place in zip(chosen, places, strict=True):
                run_to_the_end(place, attack)
        except (AssertionError, BundleError) as exc:
            click.echo(f"[✗] {exc}")
            return 1
    for attack in chosen:
        click.echo(
            f"[✓] {attack.name}: {attack.kills} killed, {attack.finished} ended before that; "
            f"{attack.checks} bundles checked, all whole; {attack.left} files of killed processes, "
            "all removed by the next one"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
