"""Access to files and programs of a machine, so that tests can substitute a recorded one."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import subprocess
from collections.abc import Callable, Sequence

COMMAND_TIMEOUT_SECONDS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandResult:
    """Result of a program.

    Attributes:
        output: its standard output; empty if it failed.
        problem: why it failed or could not be run; None if it succeeded.
    """

    output: str = ""
    problem: str | None = None

    @property
    def succeeded(self) -> bool:
        """Whether the program ran and exited with 0."""
        return self.problem is None


def run_command(command: Sequence[str]) -> CommandResult:
    """Run a program of this machine for at most ``COMMAND_TIMEOUT_SECONDS``; never raises."""
    program = shutil.which(command[0])
    if program is None:
        return CommandResult(problem=f"{command[0]} not found")
    try:
        result = subprocess.run(
            [program, *command[1:]],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_TIMEOUT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return CommandResult(problem=f"{command[0]} failed: {type(error).__name__}")
    if result.returncode:
        lines = (result.stdout + result.stderr).strip().splitlines()
        return CommandResult(problem=lines[0] if lines else f"{command[0]} failed")
    return CommandResult(output=result.stdout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
    """A machine.

    Attributes:
        root: folder of its root file system.
        run: runs a program of the machine.
    """

    root: pathlib.Path = pathlib.Path("/")
    run: Callable[[Sequence[str]], CommandResult] = run_command

    def text(self, path: str) -> str | None:
        """Return the content of a file, NUL bytes replaced by newlines; None if unreadable.

        Strings in a device tree end with NUL bytes.
        """
        try:
            content = (self.root / path.lstrip("/")).read_bytes()
        except OSError:
            return None
        return content.decode("utf-8", errors="replace").replace("\0", "\n").strip()

    def number(self, path: str) -> int | None:
        """Return the integer in a file; None if the file is unreadable or not an integer."""
        try:
            return int(self.text(path) or "")
        except ValueError:
            return None

    def folders(self, pattern: str) -> list[str]:
        """Return the absolute paths that match a glob pattern, sorted."""
        found = sorted(self.root.glob(pattern.lstrip("/")))
        return [f"/{path.relative_to(self.root).as_posix()}" for path in found]
