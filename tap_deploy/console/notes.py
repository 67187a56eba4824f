"""Prints log records of the library as lines on stderr while a command runs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import click

from tap_deploy.console.progress import clear_line


class _Lines(logging.Handler):
    """Prints ``note: …`` for records of level INFO, ``warning: …`` above; each line once."""

    def __init__(self) -> None:
        super().__init__()
        self._printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        kind = "warning" if record.levelno >= logging.WARNING else "note"
        line = f"{kind}: {' '.join(record.getMessage().split())}"
        if line not in self._printed:
            self._printed.add(line)
            with contextlib.suppress(OSError):  # a full log file must not fail the command
                clear_line()
                click.echo(line, err=True)


@contextlib.contextmanager
def notes_on_stderr() -> Iterator[None]:
    """Print records of loggers under ``tap_deploy``, from ``logging.INFO`` up."""
    logger, handler = logging.getLogger("tap_deploy"), _Lines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
