"""Findings on a Jetson: JetPack, its libraries, power mode, clocks, memory, swap."""

from __future__ import annotations

import sys

from tap_deploy.cli.doctor.finding import GIBIBYTE, Finding, found_or_missing, ok_or_warning
from tap_deploy.cli.doctor.packages import release_of
from tap_deploy.machine.jetson import Jetson
from tap_deploy.machine.memory import Memory, swap_command
from tap_deploy.machine.state import MachineState

_OLDEST_JETPACK = (6, 1)  # the first with TensorRT 10.3
# Build of ViT-B in fp16: libraries, four copies of the encoder weights, 1 GiB of workspace.
_MEMORY_FOR_BUILD = 5 * GIBIBYTE // 2
_SMALL_BOARD = 12 * GIBIBYTE
_SWAP_FOR_BUILD = 8 * GIBIBYTE  # ViT-H needs four times 1.3 GB for its weights
_HOT_C = 85.0
_USE = "tensorrt"
_INSTALL = "sudo apt-get update && sudo apt-get install nvidia-jetpack"


def board_checks(state: MachineState) -> list[Finding]:
    """Return the findings on a board; none on other machines."""
    board = state.jetson
    if board is None:
        return []
    return [
        _jetpack_check(board),
        _python_check(board),
        _component_check("tensorrt library", state.tensorrt_library, board, 0),
        _component_check("cuda toolkit", state.cuda, board, 1),
        _power_check(board),
        _clock_check(board),
        *_heat_checks(board),
        _memory_check(state.memory),
        _swap_check(state.memory),
    ]


def _jetpack_check(board: Jetson) -> Finding:
    package = board.jetpack_package or "not installed"
    detail = f"{board.jetpack or 'unknown'} (Jetson Linux {board.l4t}, nvidia-jetpack {package})"
    detail += f" on {board.model}, {board.soc}"
    if board.jetpack is None:
        remedy = "tap-export selftest BUNDLE --backend tensorrt --precision fp16"
        detail += "; this program does not know it"
        return ok_or_warning("jetpack", _USE, detail, remedy, fine=False)
    new_enough = tuple(map(int, board.jetpack.split(".")[:2])) >= _OLDEST_JETPACK
    if not new_enough:
        detail += "; engines need 6.1 or later"
    return found_or_missing("jetpack", _USE, detail, "sdkmanager", found=new_enough)


def _python_check(board: Jetson) -> Finding:
    """Compare this Python with the one that JetPack's TensorRT module was compiled for."""
    found = f"{sys.version_info.major}.{sys.version_info.minor}"
    wanted = board.components[2] if board.components else found
    detail = found if found == wanted else f"{found}; TensorRT of this JetPack is for {wanted}"
    remedy = f"/usr/bin/python{wanted} -m venv --system-site-packages .venv"
    return ok_or_warning("jetpack python", _USE, detail, remedy, fine=found == wanted)


def _component_check(name: str, version: str | None, board: Jetson, index: int) -> Finding:
    """Compare the version of a library with the one in the JetPack."""
    if version is None:
        return found_or_missing(name, _USE, "not installed", _INSTALL, found=False)
    wanted = board.components[index] if board.components else None
    fine = wanted is None or release_of(version)[:2] >= release_of(wanted)
    detail = version if fine else f"{version}; JetPack {board.jetpack} comes with {wanted}"
    return ok_or_warning(name, _USE, detail, _INSTALL, fine=fine)


def _power_check(board: Jetson) -> Finding:
    mode = board.power_mode
    if mode is None:
        remedy = "sudo nvpmodel -q"
        return ok_or_warning("power mode", _USE, "unknown", remedy, fine=False)
    remedy = f"sudo nvpmodel -m {mode.highest_id}"
    fine = mode.is_highest or mode.highest_id is None
    detail = mode.name if fine else f"{mode.name}; the board can do more"
    return ok_or_warning("power mode", _USE, detail, remedy, fine=fine)


def _clock_check(board: Jetson) -> Finding:
    gpu = board.gpu_clock
    detail = "GPU unknown" if gpu is None else f"GPU {gpu}"
    if board.cpu_clock is not None:
        detail += f", CPU {board.cpu_clock}"
    fine = gpu is not None and gpu.is_held
    return ok_or_warning("clocks", _USE, detail, "sudo jetson_clocks", fine=fine)


def _heat_checks(board: Jetson) -> list[Finding]:
    """Return the finding on temperature and throttling, if the board reports them."""
    if board.temperature_c is None and not board.throttle_events:
        return []
    detail = "unknown" if board.temperature_c is None else f"{board.temperature_c:.0f} °C"
    if board.throttle_events:
        detail += f"; over-current slowed the board down {board.throttle_events} times since start"
    fine = (board.temperature_c or 0) < _HOT_C and not board.throttle_events
    return [ok_or_warning("temperature", _USE, detail, "sudo jetson_clocks --fan", fine=fine)]


def _memory_check(memory: Memory) -> Finding:
    free = memory.available_bytes
    detail = f"{free / GIBIBYTE:.1f} of {memory.total_bytes / GIBIBYTE:.1f} GiB available"
    fine = free >= _MEMORY_FOR_BUILD
    if not fine:
        detail += f"; building engines takes {_MEMORY_FOR_BUILD / GIBIBYTE:.1f} GiB and more"
    remedy = "sudo systemctl isolate multi-user.target"  # without the desktop
    return ok_or_warning("memory", _USE, detail, remedy, fine=fine)


def _swap_check(memory: Memory) -> Finding:
    detail = f"{memory.swap_bytes / GIBIBYTE:.1f} GiB on disk"
    if memory.zram_bytes:
        detail += f", {memory.zram_bytes / GIBIBYTE:.1f} GiB zram"
    fine = memory.total_bytes >= _SMALL_BOARD or memory.swap_bytes >= _SWAP_FOR_BUILD * 0.99
    if not fine:
        detail += f"; building large engines takes {_SWAP_FOR_BUILD / GIBIBYTE:.0f} GiB on disk"
    return ok_or_warning("swap", _USE, detail, swap_command(8), fine=fine)
