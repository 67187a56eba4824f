"""The only way to a machine's files and programs, so that a recorded one can stand in."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import subprocess
from collections.abc import Callable, Sequence

COMMAND_TIMEOUT_SECONDS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandResult:
    """What a program said. ``problem`` is why it said nothing, if it could not be run."""

    output: str = ""
    problem: str | None = None

    @property
    def succeeded(self) -> bool:
        """Whether it ran and did not complain."""
        return self.problem is None


def run_command(command: Sequence[str]) -> CommandResult:
    """Run a program of this machine for at most 20 seconds; nothing is raised."""
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
    """A machine: its file system below ``root``, and what runs its programs."""

    root: pathlib.Path = pathlib.Path("/")
    run: Callable[[Sequence[str]], CommandResult] = run_command

    def text(self, path: str) -> str | None:
        """Return the content of a file, without the NUL bytes of a device tree; None if unread."""
        try:
            content = (self.root / path.lstrip("/")).read_bytes()
        except OSError:
            return None
        return content.decode("utf-8", errors="replace").replace("\0", "\n").strip()

    def number(self, path: str) -> int | None:
        """Return the whole number in a file; None if there is none."""
        try:
            return int(self.text(path) or "")
        except ValueError:
            return None

    def folders(self, pattern: str) -> list[str]:
        """Return the absolute paths that match a pattern, in order."""
        found = sorted(self.root.glob(pattern.lstrip("/")))
        return [f"/{path.relative_to(self.root).as_posix()}" for path in found]
