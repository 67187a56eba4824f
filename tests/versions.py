"""The oldest and the newest versions of what a bundle is run and converted with.

Used by scripts/test-versions:

python -m tests.versions oldest                    the oldest versions of setup.cfg, for pip
python -m tests.versions compare OLDEST NEWEST     a table; exit code 1 if anything fails
"""

from __future__ import annotations

import configparser
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import click
import numpy as np

from tap_deploy.console.exits import CleanExits
from tap_deploy.storage.unfinished import temporary_folder
from tests.micro_files import DATA, make_bundle

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "jetpack6_program.py"
PHOTO = DATA / "coffee.jpg"
EXTRAS = ("onnxruntime", "quantize")
COMMANDS = {
    "doctor": ("doctor", "--for", "run"),
    "inspect": ("inspect", "{}"),
    "verify": ("verify", "{}"),
    "selftest": ("selftest", "{}"),
    "run": ("run", "{}", str(PHOTO), "--point", "285,160", "--overlay", "{}.png", "--json"),
    "convert": ("convert", "{}", "--precision", "fp16"),
    "quantize": ("quantize", "{}", "--calibration-data", str(PHOTO), "--no-verdict"),
    "verify int8": ("verify", "{}", "--precision", "int8"),
}


def oldest_versions() -> dict[str, str]:
    """Return package -> lower bound, of the base package and of ``EXTRAS``."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", "utf-8")
    texts = [setup["options"]["install_requires"]]
    texts += [setup["options.extras_require"][extra] for extra in EXTRAS]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    found = [re.fullmatch(r"([\w-]+)>=([\d.]+)", line) for line in lines]
    unbounded = [line for line, match in zip(lines, found, strict=True) if match is None]
    assert not unbounded, f"setup.cfg gives no lower bound in {unbounded}"
    return {match[1]: match[2] for match in found if match is not None}


def answers(python: pathlib.Path, bundle: pathlib.Path, output: pathlib.Path) -> dict[str, object]:
    """Predict in an environment; returns the words of ``jetpack6_program.py`` and its arrays.

    Raises:
        RuntimeError: it failed; the message is the last line of its errors.
    """
    command = [python, PROGRAM, bundle, PHOTO, output]
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=output.parent
    )
    if result.returncode != 0:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])
    with np.load(output) as arrays:
        return {"facts": json.loads(result.stdout), **arrays}


def same_answers(found: dict[str, object], expected: dict[str, object]) -> str:
    """Return how answers differ; an empty text if they do not, but for rounding."""
    for name in ("captions", "concepts"):
        if found["facts"][name] != expected["facts"][name]:
            return f"{name} differ"
    for name in ("iou_predictions", "semantic_embeddings"):
        difference = np.abs(found[name] - expected[name]).max()
        if difference > 1e-3:  # as far apart as fp32 graphs may be from PyTorch
            return f"{name} differ by {difference:.1e}"
    share = (found["masks"] != expected["masks"]).mean()
    return f"{share:.1%} of the mask pixels differ" if share > 1e-4 else ""


def command_error(venv: pathlib.Path, words: tuple[str, ...], bundle: pathlib.Path) -> str:
    """Run a command; returns its last line if it fails, or warns of its packages, else nothing."""
    command = [venv / "bin" / "tap-export", *(word.replace("{}", str(bundle)) for word in words)]
    environment = {**os.environ, "PYTHONWARNINGS": "default::DeprecationWarning:tap_deploy"}
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=bundle.parent, env=environment
    )
    if result.returncode != 0:
        return (result.stderr.strip() or result.stdout.strip()).splitlines()[-1]
    warned = [line for line in result.stderr.splitlines() if "Deprecat" in line]
    return warned[0] if warned else ""


def installed(venv: pathlib.Path) -> dict[str, str]:
    """Return Python and the packages of ``oldest_versions`` in an environment, with versions."""
    code = (
        "import importlib.metadata as m, json, platform, sys; print(json.dumps({'python': "
        "platform.python_version()} | {name: m.version(name) for name in sys.argv[1:]}))"
    )
    command = [venv / "bin" / "python", "-c", code, *oldest_versions()]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    versions: dict[str, str] = json.loads(result.stdout)
    return versions


def results(
    venv: pathlib.Path, bundle: pathlib.Path, expected: dict[str, object]
) -> dict[str, str]:
    """Return check -> what is wrong, or nothing, for an environment."""
    copy = shutil.copytree(bundle, bundle.with_name(venv.name))
    try:
        output = bundle.parent / f"{venv.name}.npz"
        found = {"predict": same_answers(answers(venv / "bin/python", copy, output), expected)}
    except RuntimeError as exc:
        found = {"predict": str(exc)}
    return found | {name: command_error(venv, words, copy) for name, words in COMMANDS.items()}


@click.group()
def main() -> None:
    """See the script."""


@main.command("oldest", cls=CleanExits)
def oldest_command() -> None:
    """Print constraints for pip."""
    click.echo("\n".join(f"{name}=={version}" for name, version in oldest_versions().items()))


@main.command("compare", cls=CleanExits)
@click.argument("venvs", nargs=-1, required=True, type=click.Path(path_type=pathlib.Path))
@click.option(
    "--bundle",
    type=click.Path(path_type=pathlib.Path),
    help="A bundle of the micro model; default: make one.",
)
def compare_command(venvs: tuple[pathlib.Path, ...], bundle: pathlib.Path | None) -> int:
    """Run the checks in each environment, and print a table."""
    venvs = tuple(each.absolute() for each in venvs)
    with temporary_folder() as folder:
        if bundle is None:
            make_bundle(folder / "tap_micro")
        else:
            shutil.copytree(bundle, folder / "tap_micro")
        here = pathlib.Path(sys.executable)
        expected = answers(here, folder / "tap_micro", folder / "here.npz")
        found = {each.name: results(each, folder / "tap_micro", expected) for each in venvs}
    versions = {each.name: installed(each) for each in venvs}
    for row in versions[venvs[0].name]:
        click.echo(f"{row:16}" + "".join(f"{versions[each.name][row]:>12}" for each in venvs))
    for row in ("predict", *COMMANDS):
        marks = ["[✗]" if found[each.name][row] else "[✓]" for each in venvs]
        click.echo(f"{row:16}" + "".join(f"{mark:>12}" for mark in marks))
    failed = [
        (name, row, text) for name, rows in found.items() for row, text in rows.items() if text
    ]
    for name, row, text in failed:
        click.echo(f"{name}, {row}: {text}")
    return int(bool(failed))


if __name__ == "__main__":
    main()
