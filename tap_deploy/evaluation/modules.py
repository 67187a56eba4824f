"""Packages of the extra ``eval``, imported when an evaluation needs them."""

from __future__ import annotations

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
