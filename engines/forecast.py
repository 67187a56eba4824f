"""How much memory a build takes, guessed before it starts: better than being killed by the kernel.

The rule is 4 times the weights: the parsed network, the copy that is optimised, the plan that is
written, and the plan as bytes. On Jetson, where 3 to 4 times was seen, the GPU takes its workspace
from the same memory. It is a forecast, not a bound.
"""

from __future__ import annotations

from tap_deploy.cli.checks import swap_command
from tap_deploy.engines.target import GIB, BuildTarget
from tap_deploy.errors import InputError
from tap_deploy.machine.host import Host
from tap_deploy.machine.memory import linux_memory_of

WEIGHT_COPIES = 4
# Libraries, CUDA context and kernels that are tried; an allowance, not a measurement.
BASE_BYTES = GIB // 2


def build_memory_bytes(weights_bytes: int, target: BuildTarget, *, integrated: bool) -> int:
    """Return the bytes of main memory that the build of one graph is expected to take.

    Args:
        weights_bytes: of the graph.
        target: has the workspace.
        integrated: CPU and GPU share the memory, as on Jetson.
    """
    workspace = target.workspace_bytes if integrated else 0
    return BASE_BYTES + WEIGHT_COPIES * weights_bytes + workspace


def available_memory(host: Host | None = None) -> int | None:
    """Return the bytes of memory and swap that are free; None where it cannot be known.

    zram, which a Jetson has by default, is no room: it lies in the same memory, and weights do not
    become smaller in it.
    """
    memory = linux_memory_of(Host() if host is None else host)
    return None if memory is None else memory.available_bytes + memory.free_swap_bytes


def check_memory(needed_bytes: int, available_bytes: int | None, target: BuildTarget) -> None:
    """Refuse a build that memory will not do for.

    Raises:
        InputError: it takes more than there is. The message says what can be done.
    """
    if available_bytes is None or needed_bytes <= available_bytes:
        return
    gib = -(-(needed_bytes - available_bytes) // GIB)
    smaller = {"fp32": "--precision fp16, ", "fp16": "--precision int8, "}
    raise InputError(
        f"the build is expected to take {needed_bytes / GIB:.1f} GiB of memory, and "
        f"{available_bytes / GIB:.1f} GiB of memory and swap are free; add swap "
        f"({swap_command(gib)}), close programs, "
        f"try {smaller.get(target.precision, '')}a smaller --workspace or model, "
        "build on another machine with this GPU and version and copy the bundle's engines, "
        "or pass --force-memory"
    )
