"""``tap-export`` as tests call it, and what it has to say when it refuses."""

from __future__ import annotations

from click.testing import CliRunner, Result

from tap_deploy.cli import main


def invoke(*args: object) -> Result:
    """Run ``tap-export`` in this process."""
    return CliRunner().invoke(main, [str(arg) for arg in args])


def failed(result: Result, message: str, code: int) -> None:
    """The command ended with an exit code and with one line that holds ``message``."""
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def refused(result: Result, message: str) -> None:
    """The command failed on its input, and printed no result."""
    failed(result, message, code=2)
    assert result.stdout == ""
