"""Findings on every machine: Python, packages, GPU driver, disk and memory.

Packages are looked up by their metadata and not imported, except onnxruntime, which has to run a
model.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

from tap_deploy.cli.doctor.finding import GIBIBYTE, Finding, found_or_missing, ok_or_warning
from tap_deploy.cli.doctor.onnxruntime_check import onnxruntime_check
from tap_deploy.cli.doctor.packages import (
    CUDA_PYTHON,
    EVERY_USE,
    ONNXRUNTIME,
    OPENVINO,
    PACKAGES,
    PYCUDA,
    TENSORRT,
    Package,
)
from tap_deploy.machine.cpu import NO_VNNI
from tap_deploy.machine.memory import Memory, swap_command
from tap_deploy.machine.state import MachineState

_DISK_FOR_EXPORT = 8 * GIBIBYTE  # a ViT-H bundle in fp32 has 3 GB, its checkpoint another 3 GB
_MEMORY_FOR_EXPORT = 14 * GIBIBYTE  # memory limit of the test that exports ViT-H
_OLDEST_SM = (7, 5)  # oldest SM of TensorRT 10 and TensorRT-RTX
_ENGINES = "tensorrt, rtx"


def machine_checks(state: MachineState) -> list[Finding]:
    """Return the findings on this process and on a machine."""
    return [
        _python_check(),
        *(_package_check(package, state) for package in PACKAGES),
        _cuda_binding_check(state),
        _driver_check(state),
        *_sm_checks(state),
        *_cpu_checks(state),
        _disk_check(),
        *([] if state.jetson else [_memory_check(state.memory)]),
    ]


def _python_check() -> Finding:
    detail = f"{'.'.join(map(str, sys.version_info[:3]))} in {sys.prefix}"
    new_enough = sys.version_info >= (3, 10)
    return found_or_missing(
        "python", EVERY_USE, detail, "python3.10 -m venv .venv", found=new_enough
    )


def _package_check(package: Package, state: MachineState) -> Finding:
    if package is ONNXRUNTIME:
        return onnxruntime_check()
    remedy, leftover = package.install_command, package.leftover()
    if leftover is None:
        version = package.installed_version()
        problem = package.problem_with(version)
        detail = problem or version or "installed, version unknown"
        if package is OPENVINO:
            detail += "; on x86 CPUs it runs encoder and prompt decoder faster: "
            detail += "--backend cpu, also --precision bf16" if state.cpu_bf16 else "--backend cpu"
    else:
        detail = problem = f"{leftover} is a folder without the package, maybe left by an uninstall"
        remedy = f"pip install --force-reinstall {package.name}"
    if package is TENSORRT and state.jetson:
        remedy = _tensorrt_remedy(state)
    return found_or_missing(
        package.name, package.required_for, detail, remedy, found=problem is None
    )


def _tensorrt_remedy(state: MachineState) -> str:
    """Return the command for JetPack's TensorRT, the only one that supports the device."""
    if state.tensorrt_python is None:
        return "sudo apt-get install python3-libnvinfer"
    # It is installed for the system Python, which this environment does not see.
    return "python3 -m venv --system-site-packages .venv"


def _cuda_binding_check(state: MachineState) -> Finding:
    """Return the finding on the two CUDA bindings, of which one suffices."""
    checks = [_package_check(CUDA_PYTHON, state), _package_check(PYCUDA, state)]
    found = [check for check in checks if check.status == "ok"]
    detail = ", ".join(f"{check.name} {check.detail}" for check in found or checks)
    return dataclasses.replace((found or checks)[0], name="cuda binding", detail=detail)


def _driver_check(state: MachineState) -> Finding:
    detail = "; ".join(map(str, state.gpus)) or state.gpu_problem or ""
    if not state.gpus and state.jetson:
        detail = f"part of Jetson Linux {state.jetson.l4t}"
    remedy = "sudo apt-get install nvidia-driver"
    if shutil.which("ubuntu-drivers"):
        remedy = "sudo ubuntu-drivers install"
    found = bool(state.gpus or state.jetson)
    return found_or_missing("nvidia driver", _ENGINES, detail, remedy, found=found)


def _sm_checks(state: MachineState) -> list[Finding]:
    """Return the finding on the compute capability of the GPU, if it is known."""
    numbers = state.sm_numbers
    if numbers is None:
        return []
    new_enough = numbers >= _OLDEST_SM
    detail = f"SM {state.compute_capability}" + ("" if new_enough else "; engines need 7.5")
    remedy = "tap-export run BUNDLE PICTURE --backend onnxruntime"
    return [found_or_missing("gpu", _ENGINES, detail, remedy, found=new_enough)]


def _cpu_checks(state: MachineState) -> list[Finding]:
    """Return the finding on the instructions of an x86 CPU for int8 and bf16."""
    if state.cpu_int8 is None:
        return []
    remedy = "tap-export quantize BUNDLE --calibration-data DIR --reduce-range"
    detail = f"{state.cpu}; bf16: {'yes' if state.cpu_bf16 else 'no'}; int8: {state.cpu_int8}"
    fine = state.cpu_int8 != NO_VNNI
    if not fine:
        detail += ", so 7-bit weights are faster on this CPU"
    return [ok_or_warning("cpu", "quantize", detail, remedy, fine=fine)]


def _disk_check() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    remedy = "tap-export export -o FOLDER_ON_ANOTHER_DISK"
    return _room_check("disk space", free, _DISK_FOR_EXPORT, remedy)


def _memory_check(memory: Memory) -> Finding:
    return _room_check("memory", memory.available_bytes, _MEMORY_FOR_EXPORT, swap_command(16))


def _room_check(name: str, found_bytes: int, wanted_bytes: int, remedy: str) -> Finding:
    detail = f"{found_bytes / GIBIBYTE:.1f} GiB available"
    fine = found_bytes >= wanted_bytes
    if not fine:
        detail += f"; export of the largest model can take {wanted_bytes / GIBIBYTE:.0f} GiB"
    return ok_or_warning(name, "export", detail, remedy, fine=fine)
