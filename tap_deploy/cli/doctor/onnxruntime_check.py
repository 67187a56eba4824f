"""Checks onnxruntime by running it: several distributions share its folder and break each other."""

from __future__ import annotations

import importlib.metadata

from tap_deploy.cli.doctor.finding import Finding, found_or_missing, ok_or_warning
from tap_deploy.cli.doctor.packages import ONNXRUNTIME
from tap_deploy.cli.doctor.probe import working_providers
from tap_deploy.errors import MissingDependencyError, first_line
from tap_deploy.optional_modules import distributions_of
from tap_deploy.sessions.ort.session import import_onnxruntime

_NAME = ONNXRUNTIME.name


def onnxruntime_check() -> Finding:
    """Return the finding on onnxruntime, after loading it and running a model on every provider."""
    installed = distributions_of(_NAME)
    try:
        runtime = import_onnxruntime()
    except MissingDependencyError as error:
        cause = error.__cause__
        if not installed and isinstance(cause, ModuleNotFoundError) and cause.name == _NAME:
            return _missing("not installed", ONNXRUNTIME.install_command)
        detail = f"cannot be loaded: {first_line(cause or error)}"
        if installed:
            detail += f"; installed: {_listed(installed)}"
        return _missing(detail, _repair(installed))
    version = str(getattr(runtime, "__version__", ""))
    problem = ONNXRUNTIME.problem_with(version)
    if problem is not None:
        return _missing(problem, f"pip install --upgrade {_wanted(installed)}")
    results = working_providers(runtime)
    findings = ", ".join(
        f"{name.removesuffix('ExecutionProvider')} {failure or 'works'}"
        for name, failure in results.items()
    )
    detail = f"{version or 'version unknown'}: {findings}"
    if results.get("CPUExecutionProvider", "no CPU provider") is not None:
        return _missing(detail, _repair(installed))
    if len(installed) > 1:
        detail += f"; installed: {_listed(installed)}, which overwrite each other's files"
    return ok_or_warning(
        _NAME, ONNXRUNTIME.required_for, detail, _repair(installed), fine=len(installed) < 2
    )


def _missing(detail: str, remedy: str) -> Finding:
    return found_or_missing(_NAME, ONNXRUNTIME.required_for, detail, remedy, found=False)


def _listed(installed: list[str]) -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in installed)


def _wanted(installed: list[str]) -> str:
    """Return the distribution to keep: the plain one is often only a dependency of another."""
    return next((name for name in installed if name != _NAME), _NAME)


def _repair(installed: list[str]) -> str:
    """Return the command that reinstalls it; uninstalls all first, as they share files."""
    install = f"pip install --force-reinstall {_wanted(installed)}"
    if len(installed) < 2:
        return install
    return f"pip uninstall -y {' '.join(installed)} && {install}"
