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
    """

    total_bytes: int
    available_bytes: int
    swap_bytes: int
    zram_bytes: int


def memory_of(host: Host) -> Memory:
    """Read ``/proc/meminfo`` and ``/proc/swaps``; where they are missing, ask the C library."""
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", host.text("/proc/meminfo") or "", re.MULTILINE))
    if "MemAvailable" not in sizes:  # not Linux: the installed memory is the next best answer
        installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Memory(total_bytes=installed, available_bytes=installed, swap_bytes=0, zram_bytes=0)
    rows = re.findall(r"^(\S+)\s+\w+\s+(\d+)\s", host.text("/proc/swaps") or "", re.MULTILINE)
    zram = sum(int(size) for name, size in rows if "zram" in name)
    swap = sum(int(size) for name, size in rows if "zram" not in name)
    return Memory(
        total_bytes=1024 * int(sizes["MemTotal"]),
        available_bytes=1024 * int(sizes["MemAvailable"]),
        swap_bytes=1024 * swap,
        zram_bytes=1024 * zram,
    )
