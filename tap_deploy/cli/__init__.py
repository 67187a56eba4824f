"""``tap-export``: the command line. Commands parse and call; nothing heavy is imported here."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from tap_deploy import __version__
from tap_deploy.errors import TapError

# Command -> module and attribute; loaded when the command is used.
COMMANDS = {
    "export": ("tap_deploy.cli.export", "export_command"),
    "run": ("tap_deploy.cli.run", "run_command"),
    "verify": ("tap_deploy.cli.verify", "verify_command"),
    "eval-demo": ("tap_deploy.cli.eval_demo", "eval_demo_command"),
    "inspect": ("tap_deploy.cli.inspect", "inspect_command"),
    "doctor": ("tap_deploy.cli.doctor", "doctor_command"),
    "completion": ("tap_deploy.cli.completion", "completion_command"),
}
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class TapGroup(click.Group):
    """Loads commands late, and turns errors into one line and an exit code."""

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

    def main(  # type: ignore[override]  # click overloads it by the value of standalone_mode
        self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        """Run, and exit with 0 (passed), 1 (a check failed) or 2 (bad input or environment)."""
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **extra)
        try:
            code = super().main(args, standalone_mode=False, **extra)
        except TapError as exc:
            click.echo(f"error: {exc}", err=True)
            sys.exit(exc.exit_code)
        except click.ClickException as exc:
            exc.show()
            sys.exit(EXIT_BAD_INPUT)
        except click.Abort:
            click.echo("interrupted", err=True)
            sys.exit(EXIT_INTERRUPTED)
        except Exception as exc:
            # A defect of ours. Python would exit with 1, which here means "a check failed".
            traceback.print_exc()
            click.echo(f"error: internal error, please report it: {exc!r}", err=True)
            sys.exit(EXIT_BAD_INPUT)
        sys.exit(code if isinstance(code, int) else 0)


@click.group(cls=TapGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tap-export")
def main() -> None:
    r"""Tokenize Anything, deployed: export a checkpoint, run and verify the bundle.

    \b
    Exit codes: 0 passed, 1 a check failed, 2 bad input or environment.
    Results go to stdout, everything else to stderr.
    """
