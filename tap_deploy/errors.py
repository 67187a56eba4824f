"""Every error that this project raises on purpose.

    TapError                     exit code 2: bad input or environment
    ├── InputError               an image, prompt, option or config that cannot be used
    ├── CheckpointError          weights that cannot be read, trusted or matched to the model
    │   └── UnsafeCheckpointError    a pickle that asks for more than arrays and containers
    ├── BundleError              a bundle that is incomplete, changed, or of another schema
    ├── SessionError             a backend that is unknown, missing or failed to run a graph
    ├── MissingDependencyError   an optional package that this command needs
    └── VerificationError        exit code 1: a check ran and failed

A message is one line: what is wrong, what was found, what was expected, what to do next.
"""

import numbers
from typing import Any


class TapError(Exception):
    """Base of all errors of this project; ``exit_code`` is what the CLI returns for it."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        # Paths and foreign errors may bring line breaks along; a message is one line.
        super().__init__("".join(c if c.isprintable() else " " for c in message))


class InputError(TapError, ValueError):
    """An image, prompt, option or config that cannot be used."""


class CheckpointError(TapError):
    """Weights that cannot be read, or do not fit the model."""


class UnsafeCheckpointError(CheckpointError):
    """A pickle that would rebuild something other than arrays, dtypes and plain containers."""


class BundleError(TapError):
    """A bundle that is missing, incomplete, changed or of another schema version."""


class SessionError(TapError):
    """A backend that is unknown or unavailable, or a graph that could not be run."""


class MissingDependencyError(TapError):
    """An optional package is not installed; the message names the extra that brings it."""


class VerificationError(TapError):
    """A check ran to its end and failed."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """Return the first line of a foreign error that says something; its class if none does."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def require_int(name: str, value: Any, minimum: int) -> None:
    """Raise InputError unless a value is a whole number of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise InputError(f"{name} is {value!r}; expected a whole number of at least {minimum}")
