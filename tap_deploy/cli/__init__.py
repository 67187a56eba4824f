"""``tap-export``: the command line. Commands parse, call and print."""

from __future__ import annotations

import importlib

import click

from tap_deploy import __version__
from tap_deploy.console.exits import CleanExits

# Command -> module and attribute; imported when the command is used.
COMMANDS = {
    "export": ("tap_deploy.cli.export", "export_command"),
    "convert": ("tap_deploy.cli.convert", "convert_command"),
    "build": ("tap_deploy.cli.build", "build_command"),
    "run": ("tap_deploy.cli.run", "run_command"),
    "verify": ("tap_deploy.cli.verify", "verify_command"),
    "selftest": ("tap_deploy.cli.selftest", "selftest_command"),
    "bench": ("tap_deploy.cli.bench", "bench_command"),
    "quantize": ("tap_deploy.cli.quantize", "quantize_command"),
    "verdict": ("tap_deploy.cli.verdict", "verdict_command"),
    "eval-demo": ("tap_deploy.cli.eval_demo", "eval_demo_command"),
    "samples": ("tap_deploy.cli.samples", "samples_command"),
    "plan": ("tap_deploy.cli.estimate", "plan_command"),
    "inspect": ("tap_deploy.cli.inspect", "inspect_command"),
    "doctor": ("tap_deploy.cli.doctor.doctor", "doctor_command"),
    "completion": ("tap_deploy.cli.completion", "completion_command"),
}


class TapGroup(CleanExits, click.Group):
    """Imports commands on use, and turns errors into one line and an exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Show the help if no command is named."""
        return super().parse_args(ctx, args or ["--help"])

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(cls=TapGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tap-export")
def main() -> None:
    """Tokenize Anything, deployed: export a checkpoint, run and verify the bundle.

    \b
    Exit codes: 0 passed, 1 a check failed, 2 bad input or environment.
    Results go to stdout, everything else to stderr.
    """  # noqa: D301
