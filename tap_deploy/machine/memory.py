"""Memory and swap of a machine."""

from __future__ import annotations

import dataclasses
import os
import re

from tap_deploy.machine.host import Host


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of memory and swap.

    Attributes:
        total_bytes: installed, less what firmware keeps.
        available_bytes: what programs can still get without swapping.
        swap_bytes: swap on a disk.
        zram_bytes: swap into compressed memory: it gives no room for weights.
        free_swap_bytes: what is left of the swap on a disk.
    """

    total_bytes: int
    available_bytes: int
    swap_bytes: int
    zram_bytes: int
    free_swap_bytes: int = 0


def memory_of(host: Host) -> Memory:
    """Read ``/proc/meminfo`` and ``/proc/swaps``; where they are missing, ask the C library."""
    known = linux_memory_of(host)
    if known is not None:
        return known
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # the next best answer
    return Memory(total_bytes=installed, available_bytes=installed, swap_bytes=0, zram_bytes=0)


def linux_memory_of(host: Host) -> Memory | None:
    """Read ``/proc/meminfo`` and ``/proc/swaps``; None where they do not say what is available."""
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", host.text("/proc/meminfo") or "", re.MULTILINE))
    if "MemAvailable" not in sizes:
        return None
    rows = [
        (name, int(size), int(used))
        for name, size, used in re.findall(
            r"^(\S+)\s+\w+\s+(\d+)\s+(\d+)\s", host.text("/proc/swaps") or "", re.MULTILINE
        )
    ]
    on_disk = [(size, used) for name, size, used in rows if "zram" not in name]
    return Memory(
        total_bytes=1024 * int(sizes.get("MemTotal", 0)),
        available_bytes=1024 * int(sizes["MemAvailable"]),
        swap_bytes=1024 * sum(size for size, _ in on_disk),
        zram_bytes=1024 * sum(size for name, size, _ in rows if "zram" in name),
        free_swap_bytes=1024 * sum(size - used for size, used in on_disk),
    )
