"""The exceptions of this project.

    TapError                     exit code 2: bad input or environment
    ├── InputError               invalid image, prompt, option or config
    ├── CheckpointError          weights that are unreadable or do not match the model
    │   └── UnsafeCheckpointError    a pickle with anything besides arrays and plain containers
    ├── BundleError              bundle missing, incomplete, modified or of another schema version
    ├── SessionError             backend unknown or unavailable, or a graph failed to load or run
    ├── MissingDependencyError   an optional package is not installed
    ├── HubError                 the model hub does not answer, or does not have what was asked for
    └── VerificationError        exit code 1: a check ran and failed

Every message is one line: what is wrong, what was found, what was expected, what to do next.
"""

import numbers
from typing import Any


class TapError(Exception):
    """Base class of all errors of this project; the CLI exits with ``exit_code``."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        # Paths and messages of other libraries may contain line breaks.
        super().__init__("".join(c if c.isprintable() else " " for c in message))


class InputError(TapError, ValueError):
    """Invalid image, prompt, option or config."""


class CheckpointError(TapError):
    """Weights that are unreadable or do not match the model."""


class UnsafeCheckpointError(CheckpointError):
    """A pickle with anything besides arrays, dtypes and plain containers."""


class BundleError(TapError):
    """A bundle that is missing, incomplete, modified or of another schema version."""


class SessionError(TapError):
    """A backend that is unknown or unavailable, or a graph that failed to load or run."""


class MissingDependencyError(TapError):
    """An optional package is not installed; the message names the extra to install."""


class HubError(TapError):
    """A model hub that does not answer, or does not have or does not give what was asked for."""


class VerificationError(TapError):
    """A check that completed and failed."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's message, or else its class name."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def require_int(name: str, value: Any, minimum: int) -> None:
    """Raise InputError unless a value is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise InputError(f"{name} is {value!r}; expected a whole number of at least {minimum}")


def require_share(name: str, value: Any) -> None:
    """Raise InputError unless a value is a number from 0 to 1."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number and 0 <= value <= 1):
        raise InputError(f"{name} is {value!r}; expected a number from 0 to 1")
