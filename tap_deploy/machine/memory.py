"""Memory and swap of a machine."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator

from tap_deploy.machine.cgroups import group_folders
from tap_deploy.machine.host import Host

# Per version of control groups: limit, what is in use, and how much of that is cache of files,
# which the kernel gives up when programs ask for memory.
_GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of memory and swap.

    Attributes:
        total_bytes: installed, less what firmware keeps.
        available_bytes: what this program can still get without swapping: of the machine, and
            within the limits of its control groups.
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
    """Read ``/proc``, and the control groups; None where it does not say what is available."""
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
        available_bytes=min([1024 * int(sizes["MemAvailable"]), *_left_in_groups(host)]),
        swap_bytes=1024 * sum(size for size, _ in on_disk),
        zram_bytes=1024 * sum(size for name, size, _ in rows if "zram" in name),
        free_swap_bytes=1024 * sum(size - used for size, used in on_disk),
    )


def _left_in_groups(host: Host) -> Iterator[int]:
    """Yield how many bytes each control group of this process has left, where it is limited."""
    for version, folder in group_folders(host, "memory"):
        limit_file, used_file, cache_name = _GROUP_FILES[version]
        limit, used = (host.number(f"{folder}/{name}") for name in (limit_file, used_file))
        if limit is None or used is None:
            continue
        stat = host.text(f"{folder}/memory.stat") or ""
        cache = re.search(rf"^{cache_name} (\d+)$", stat, re.MULTILINE)
        yield max(0, limit - used + (int(cache[1]) if cache else 0))
