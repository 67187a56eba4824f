"""What the library logs while a command runs, as lines on stderr."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import click

from tap_deploy.console.progress import clear_line


class _Lines(logging.Handler):
    """Prints ``note: …`` for what is logged as information, ``warning: …`` above; each once."""

    def __init__(self) -> None:
        super().__init__()
        self._printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        kind = "warning" if record.levelno >= logging.WARNING else "note"
        line = f"{kind}: {' '.join(record.getMessage().split())}"
        if line not in self._printed:
            self._printed.add(line)
            with contextlib.suppress(OSError):  # a full log file is no reason to fail
                clear_line()
                click.echo(line, err=True)


@contextlib.contextmanager
def notes_on_stderr() -> Iterator[None]:
    """Print what loggers under ``tap_deploy`` say, from ``logging.INFO`` up."""
    logger, handler = logging.getLogger("tap_deploy"), _Lines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
