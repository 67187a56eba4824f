"""``tap-export``: the command line. Commands parse, call and print."""

from __future__ import annotations

import click

from tap_deploy import __version__
from tap_deploy.cli.lazy_group import LazyGroup
from tap_deploy.console.exits import CleanExits

# Command -> module and attribute; imported when the command is used.
COMMANDS = {
    "fetch": ("tap_deploy.cli.fetch", "fetch_command"),
    "export": ("tap_deploy.cli.export", "export_command"),
    "convert": ("tap_deploy.cli.convert", "convert_command"),
    "build": ("tap_deploy.cli.build", "build_command"),
    "run": ("tap_deploy.cli.run", "run_command"),
    "serve": ("tap_deploy.cli.serve", "serve_command"),
    "verify": ("tap_deploy.cli.verify", "verify_command"),
    "selftest": ("tap_deploy.cli.selftest", "selftest_command"),
    "bench": ("tap_deploy.cli.bench", "bench_command"),
    "quantize": ("tap_deploy.cli.quantize", "quantize_command"),
    "verdict": ("tap_deploy.cli.verdict", "verdict_command"),
    "eval": ("tap_deploy.cli.evaluate.group", "eval_command"),
    "samples": ("tap_deploy.cli.samples", "samples_command"),
    "plan": ("tap_deploy.cli.estimate", "plan_command"),
    "push": ("tap_deploy.cli.push", "push_command"),
    "inspect": ("tap_deploy.cli.inspect", "inspect_command"),
    "doctor": ("tap_deploy.cli.doctor.doctor", "doctor_command"),
    "completion": ("tap_deploy.cli.completion", "completion_command"),
}


class TapGroup(CleanExits, LazyGroup):
    """Turns errors into one line and an exit code."""


@click.group(
    cls=TapGroup, members=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="tap-export")
def main() -> None:
    """Tokenize Anything, deployed: export a checkpoint, run and verify the bundle.

    \b
    Exit codes: 0 passed, 1 a check failed, 2 bad input or environment.
    Results go to stdout, everything else to stderr.
    """  # noqa: D301
