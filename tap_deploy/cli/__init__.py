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
    "convert": ("tap_deploy.cli.convert", "convert_command"),
    "build": ("tap_deploy.cli.build", "build_command"),
    "run": ("tap_deploy.cli.run", "run_command"),
    "verify": ("tap_deploy.cli.verify", "verify_command"),
    "selftest": ("tap_deploy.cli.selftest", "selftest_command"),
    "quantize": ("tap_deploy.cli.quantize", "quantize_command"),
    "verdict": ("tap_deploy.cli.verdict", "verdict_command"),
    "eval-demo": ("tap_deploy.cli.eval_demo", "eval_demo_command"),
    "samples": ("tap_deploy.cli.samples", "samples_command"),
    "plan": ("tap_deploy.cli.plan", "plan_command"),
    "inspect": ("tap_deploy.cli.inspect", "inspect_command"),
    "doctor": ("tap_deploy.cli.doctor", "doctor_command"),
    "completion": ("tap_deploy.cli.completion", "completion_command"),
}
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


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
            sys.stdout.flush()  # or a full disk would go unnoticed
        except Exception as exc:
            sys.exit(_explain(exc))
        except SystemExit as exc:
            # The one thing that click answers with 1 here is that our reader has left.
            sys.exit(EXIT_BROKEN_PIPE if exc.code == 1 else exc.code)
        sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception) -> int:
    """Print one line about an error on stderr, and return the exit code for it."""
    match error:
        case TapError():
            line, code = str(error), error.exit_code
        case click.Abort():
            line, code = "interrupted", EXIT_INTERRUPTED
        case click.UsageError(ctx=context) if context is not None:
            line = f"{error.format_message()} See: {context.command_path} --help"
            code = EXIT_BAD_INPUT
        case click.ClickException():
            line, code = error.format_message(), EXIT_BAD_INPUT
        case OSError() | MemoryError():
            line, code = f"{type(error).__name__}: {error}", EXIT_BAD_INPUT
        case _:
            # A defect of ours. Python would exit with 1, which here means "a check failed".
            traceback.print_exception(error)
            line, code = f"internal error, please report it: {error!r}", EXIT_BAD_INPUT
    click.echo(f"error: {' '.join(line.split())}", err=True)
    return code


@click.group(cls=TapGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tap-export")
def main() -> None:
    """Tokenize Anything, deployed: export a checkpoint, run and verify the bundle.

    \b
    Exit codes: 0 passed, 1 a check failed, 2 bad input or environment.
    Results go to stdout, everything else to stderr.
    """  # noqa: D301
