"""Exit codes of commands, and one line on stderr per error."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import signal
import sys
import threading
import traceback
import types
from collections.abc import Iterator, Sequence
from typing import Any

import click

from tap_deploy.console.notes import notes_on_stderr
from tap_deploy.errors import TapError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
# The signals that end a process in order, and their words; the exit code is 128 + the number.
ENDINGS = {signal.SIGTERM: "terminated", signal.SIGHUP: "the terminal was closed"}


class CleanExits(click.Command):
    """A command whose return value is the exit code, and whose errors become one line."""

    def main(  # type: ignore[override]  # click overloads it by the value of standalone_mode
        self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        """Run, and exit with 0 (passed), 1 (a check failed) or 2 (bad input or environment)."""
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **extra)
        if sys.stderr is None:  # it was closed before the start
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
        _accept_any_text(sys.stdout)
        try:
            with _clean_up_when_terminated(), notes_on_stderr():
                code = super().main(args, standalone_mode=False, **extra)
            if sys.stdout is not None:  # None: it was closed before the start
                sys.stdout.flush()  # reports a full disk
        except Exception as exc:
            sys.exit(_explain(exc))
        except SystemExit as exc:
            # click exits with 1 only if the reader of stdout has closed the pipe.
            sys.exit(EXIT_BROKEN_PIPE if exc.code == 1 else exc.code)
        sys.exit(code if isinstance(code, int) else 0)


def _accept_any_text(stream: Any) -> None:
    """Let a stream take file names that are not UTF-8, and characters that its encoding lacks."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        is_utf8 = codecs.lookup(stream.encoding).name == "utf-8"
        stream.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")


@contextlib.contextmanager
def _clean_up_when_terminated() -> Iterator[None]:
    """Handle ``ENDINGS`` like Ctrl-C, to delete unfinished files; a second one ends at once.

    Signals that somebody else handles, or ignores as nohup does, stay as they are.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    ours = [each for each in ENDINGS if signal.getsignal(each) is signal.SIG_DFL]

    def reset() -> None:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)

    def terminate(number: int, frame: types.FrameType | None) -> None:
        reset()
        _print_error(ENDINGS[signal.Signals(number)])
        sys.exit(128 + number)

    if not in_main_thread:
        yield
        return
    for each in ours:
        signal.signal(each, terminate)
    try:
        yield
    finally:
        reset()


def _explain(error: Exception) -> int:
    """Print an error as one line on stderr, and return its exit code."""
    match error:
        case TapError():
            line, code = str(error), error.exit_code
        case click.Abort():
            line, code = "interrupted", EXIT_INTERRUPTED
        case click.UsageError(ctx=context) if context is not None:
            message = error.format_message()
            stop = "" if message.endswith((".", "?")) else "."  # click ends lists without one
            line = f"{message}{stop} See: {context.command_path} --help"
            code = EXIT_BAD_INPUT
        case click.ClickException():
            line, code = error.format_message(), EXIT_BAD_INPUT
        case OSError() | MemoryError():
            line, code = f"{type(error).__name__}: {error}", EXIT_BAD_INPUT
        case _:
            # A bug. Python would exit with 1, which means "a check failed" here.
            traceback.print_exception(error)
            line, code = f"internal error, please report it: {error!r}", EXIT_BAD_INPUT
    _print_error(" ".join(line.split()))
    return code


def _print_error(line: str) -> None:
    with contextlib.suppress(OSError):  # stderr is closed or full; the exit code must not change
        click.echo(f"error: {line}", err=True)
