"""``tap-export`` as tests call it, and what it has to say when it refuses."""

from __future__ import annotations

from click.testing import CliRunner, Result

from tap_deploy.cli import main


def invoke(*args: object) -> Result:
    """Run ``tap-export`` in this process."""
    return CliRunner().invoke(main, [str(arg) for arg in args])


def refused(result: Result, message: str, code: int = 2) -> None:
    """The command failed with one line that holds ``message``, and printed no result."""
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert result.stdout == ""
