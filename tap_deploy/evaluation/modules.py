"""Packages of the extra ``eval``, imported when an evaluation needs them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from types import ModuleType

from tap_deploy.optional_modules import require_module

_USE, _EXTRA = "this evaluation", "eval"


def eval_module(name: str) -> ModuleType:
    """Import a module of a package of the extra.

    Raises:
        MissingDependencyError: the package is not installed, or broken.
    """
    package = name.partition(".")[0]
    if package != name:
        require_module(package, _USE, _EXTRA)
    return require_module(name, _USE, _EXTRA)


@contextlib.contextmanager
def old_code() -> Iterator[None]:
    """Ignore warnings of pycocotools and lvis that they use what NumPy and Python deprecate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
