"""docs/jetson.md: its commands and options exist, and its tables match the code."""

from __future__ import annotations

import importlib
import pathlib
import re
import shlex

import click
import pytest

from tap_deploy.cli import COMMANDS
from tap_deploy.config import TapConfig
from tap_deploy.engines.estimate.devices import DEVICE_PROFILES, GIBIBYTE, device_profile
from tap_deploy.engines.estimate.estimate import EstimateOptions, estimate_for_device
from tap_deploy.machine.jetson import COMPONENTS

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "jetson.md").read_text("utf-8")


def command_lines(start: str) -> list[str]:
    """The lines of code blocks, and code in the text, that begin with a command."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
    return [line.strip() for line in (*lines, *spans) if line.strip().startswith(start)]


def check_options(command: click.Command, words: list[str]) -> None:
    known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
    used = {word.split("=")[0] for word in words if word.startswith("--")}
    assert used <= known, f"{words} uses {sorted(used - known)}"


LINES = sorted(set(command_lines("tap-export ")))


def test_the_page_shows_every_step():
    used = {shlex.split(line, comments=True)[1] for line in LINES}
    assert used >= {"export", "convert", "plan", "doctor", "build", "selftest", "run", "bench"}


@pytest.mark.parametrize("line", LINES)
def test_commands_exist(line):
    words = shlex.split(line.split(" > ")[0].replace("…", ""), comments=True)
    name = words[1]
    if name == "quantize" and name not in COMMANDS:
        pytest.skip("the command is not part of this version")
    module, attribute = COMMANDS[name]
    check_options(getattr(importlib.import_module(module), attribute), words[2:])


def test_options_named_in_the_text_exist():
    module, attribute = COMMANDS["build"]
    build = getattr(importlib.import_module(module), attribute)
    for option in ("--opt-level", "--force-memory", "--emit", "--workspace", "--max-prompts"):
        assert option in PAGE
        check_options(build, [option])


def test_versions_are_those_that_the_doctor_expects():
    rows = re.findall(r"^\| ([\d., ]+) \| [^|]+\| [^|]+\| (\S+) \| (\S+) \| (\S+) \|$", PAGE, re.M)
    found = {jetpack: tuple(rest) for row, *rest in rows for jetpack in row.split(", ")}
    assert found == COMPONENTS


def estimate(model, device, **options):
    config = TapConfig.from_name(model)
    return estimate_for_device(model, config, device, EstimateOptions(**options))


def test_the_memory_table_is_what_the_command_says():
    rows = re.findall(r"^\| `(tap_vit_.)` (fp16|int8) \| ([\d.]+) \| ([\d.]+) \|", PAGE, re.M)
    assert len(rows) == 6
    for model, precision, build, run in rows:
        found = estimate(model, device_profile("orin-nano"), precision=precision)
        for text, memory in ((build, found.build), (run, found.run)):
            assert float(text) == pytest.approx(memory.total_bytes / GIBIBYTE, abs=0.051)


def test_the_time_table_is_what_the_command_says():
    rows = re.findall(
        r"^\| ([^|]+) \| (\d+, \d+ to [^|]+) \|([^|]+)\|([^|]+)\|([^|]+)\|$", PAGE, re.M
    )
    assert len(rows) == 4
    for title, *cells in rows:
        (device,) = (
            profile
            for profile in DEVICE_PROFILES.values()
            if all(word in profile.title for word in title.split())
        )
        found = estimate("tap_vit_b", device, prompts=16, tokens=12)
        expected = [
            (stage.roofline_ms, stage.expected_low_ms, stage.expected_high_ms)
            for stage in found.stages
        ]
        for cell, values in zip(cells, [*expected, found.expected_ms], strict=True):
            numbers = [int(word) for word in re.findall(r"\d+", cell)]
            assert numbers == [pytest.approx(value, abs=0.5) for value in values]
