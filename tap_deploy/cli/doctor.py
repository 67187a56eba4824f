"""What this machine has, what it lacks, and the command that mends it.

Nothing heavy is imported: packages are looked up by their metadata. The exception is onnxruntime,
which is believed only after it has run a model.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import click

from tap_deploy import __version__
from tap_deploy.cli.packages import (
    CUDA_PYTHON,
    EVERY_USE,
    ONNXRUNTIME,
    PACKAGES,
    PYCUDA,
    TENSORRT,
    USES,
    Package,
)
from tap_deploy.cli.probe import working_providers

_GIB = 2**30
_DISK_FOR_EXPORT = 8 * _GIB  # a ViT-H bundle in fp32 is 3 GB, its checkpoint another 3
_MEMORY_FOR_EXPORT = 14 * _GIB  # the limit that the export of ViT-H is held to
_JETSON_RELEASE = Path("/etc/nv_tegra_release")
_STYLES = {"ok": "green", "missing": "red", "warning": "yellow"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    ``status`` is "missing" if something is absent, too old or does not work, and "warning" if it
    may become a hindrance. ``remedy`` is a command, None if nothing is wrong.
    ``required_for`` lists the uses that need it, comma-separated: some of ``USES``, or "coco".
    """

    name: str
    status: Literal["ok", "missing", "warning"]
    detail: str
    remedy: str | None
    required_for: str


def diagnose() -> list[Check]:
    """Look at Python, packages, GPU driver, disk and memory of this machine."""
    return [
        _python_check(),
        *map(_package_check, PACKAGES),
        _cuda_binding_check(),
        _driver_check(),
        _disk_check(),
        _memory_check(),
    ]


def missing_for(use: str, checks: list[Check]) -> list[str]:
    """Return the names of the checks that stand in the way of one of ``USES``."""
    return [c.name for c in checks if c.status == "missing" and use in c.required_for.split(", ")]


def _found_or_missing(
    name: str, required_for: str, detail: str, remedy: str, *, found: bool
) -> Check:
    return Check(
        name=name,
        status="ok" if found else "missing",
        detail=detail,
        remedy=None if found else remedy,
        required_for=required_for,
    )


def _python_check() -> Check:
    detail = f"{'.'.join(map(str, sys.version_info[:3]))} in {sys.prefix}"
    new_enough = sys.version_info >= (3, 10)
    return _found_or_missing(
        "python", EVERY_USE, detail, "python3.10 -m venv .venv", found=new_enough
    )


def _package_check(package: Package) -> Check:
    version = package.installed_version()
    problem = package.problem_with(version)
    detail = problem or version or "installed, version unknown"
    remedy = package.install_command
    if package is TENSORRT and _JETSON_RELEASE.exists():
        # JetPack's own TensorRT is the only one that knows the device.
        remedy = "sudo apt-get install python3-libnvinfer"
    elif package is ONNXRUNTIME and problem is None:
        detail, problem = _inference_report(detail)
        remedy = f"pip install --force-reinstall {package.name}"
    return _found_or_missing(
        package.name, package.required_for, detail, remedy, found=problem is None
    )


def _inference_report(version: str) -> tuple[str, str | None]:
    """Run a model with onnxruntime; return what each provider did, and what fails on the CPU."""
    try:
        results = working_providers(importlib.import_module(ONNXRUNTIME.name))
    except ImportError as error:
        results = {"CPUExecutionProvider": str(error).splitlines()[0]}
    findings = ", ".join(
        f"{name.removesuffix('ExecutionProvider')} {failure or 'works'}"
        for name, failure in results.items()
    )
    return f"{version}: {findings}", results.get("CPUExecutionProvider", "no CPU provider")


def _cuda_binding_check() -> Check:
    """Look for either of the two CUDA bindings."""
    checks = [_package_check(CUDA_PYTHON), _package_check(PYCUDA)]
    found = [check for check in checks if check.status == "ok"]
    detail = ", ".join(f"{check.name} {check.detail}" for check in found or checks)
    return dataclasses.replace((found or checks)[0], name="cuda binding", detail=detail)


def _driver_check() -> Check:
    detail, found = _driver_report()
    remedy = "sudo apt-get install nvidia-driver"
    if shutil.which("ubuntu-drivers"):
        remedy = "sudo ubuntu-drivers install"
    return _found_or_missing("nvidia driver", "tensorrt, rtx", detail, remedy, found=found)


def _driver_report() -> tuple[str, bool]:
    """Return what the driver says of its GPUs, and whether it could say it."""
    program = shutil.which("nvidia-smi")
    if program is None and _JETSON_RELEASE.exists():  # the driver is part of the system image
        return _JETSON_RELEASE.read_text(encoding="utf-8").splitlines()[0], True
    if program is None:
        return "nvidia-smi not found", False
    query = "--query-gpu=name,driver_version,compute_cap,memory.total"
    try:
        result = subprocess.run(
            [program, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi failed: {type(error).__name__}", False
    lines = (result.stdout or result.stderr).strip().splitlines()
    return "; ".join(lines) or "nvidia-smi found no GPU", result.returncode == 0 and bool(lines)


def _disk_check() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    remedy = "tap-export export -o FOLDER_ON_ANOTHER_DISK"
    return _room_check("disk space", free, _DISK_FOR_EXPORT, remedy)


def _memory_check() -> Check:
    swap = "/swapfile"
    remedy = f"sudo fallocate -l 16G {swap} && sudo mkswap {swap} && sudo swapon {swap}"
    return _room_check("memory", _available_memory(), _MEMORY_FOR_EXPORT, remedy)


def _room_check(name: str, found_bytes: int, wanted_bytes: int, remedy: str) -> Check:
    detail = f"{found_bytes / _GIB:.1f} GiB available"
    if found_bytes >= wanted_bytes:
        return Check(name=name, status="ok", detail=detail, remedy=None, required_for="export")
    detail += f"; exporting the largest model can take {wanted_bytes / _GIB:.0f} GiB"
    return Check(name=name, status="warning", detail=detail, remedy=remedy, required_for="export")


def _available_memory() -> int:
    """Return the bytes that programs can still get."""
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:  # not Linux: the installed memory is the next best answer
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
@click.option(
    "--for", "use", type=click.Choice(USES), help="Exit with 2 if this use lacks something."
)
@click.pass_context
def doctor_command(context: click.Context, as_json: bool, use: str | None) -> None:
    """Show what is installed, what is missing, and the command that mends it."""
    checks = diagnose()
    missing = {name: missing_for(name, checks) for name in USES}
    if as_json:
        report = {
            "version": __version__,
            "missing": missing,
            "checks": [dataclasses.asdict(check) for check in checks],
        }
        click.echo(json.dumps(report, indent=2))
    else:
        _print_report(checks, missing)
    if use and missing[use]:
        context.exit(2)


def _print_report(checks: list[Check], missing: dict[str, list[str]]) -> None:
    for check in checks:
        status = click.style(f"{check.status:<8}", fg=_STYLES[check.status])
        click.echo(f"{status} {check.name:<14} {check.detail}")
        if check.remedy:
            click.echo(f"{'':24}for {check.required_for}: {check.remedy}")
    for use, names in missing.items():
        click.echo(f"{use:<9}{'is missing ' + ', '.join(names) if names else 'is ready'}")
