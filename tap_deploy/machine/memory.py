"""Memory and swap of a machine."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import re
import sys
from collections.abc import Iterator

from tap_deploy.machine.cgroups import group_folders
from tap_deploy.machine.host import Host

# cgroup version -> file of the limit, file of the usage, and entry of the file cache, which is part
# of the usage but reclaimable.
_GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory and swap of a machine.

    Attributes:
        total_bytes: memory usable by the kernel, bytes.
        available_bytes: memory that this process can allocate without swapping, within the limits
            of its control groups, bytes.
        swap_bytes: swap on disk, bytes.
        zram_bytes: swap in compressed memory, bytes; it does not help with weights, which do not
            compress.
        free_swap_bytes: free swap on disk, bytes.
    """

    total_bytes: int
    available_bytes: int
    swap_bytes: int
    zram_bytes: int
    free_swap_bytes: int = 0


def peak_rss_bytes(host: Host) -> int:
    """Return the peak of the resident memory of this process, bytes.

    ``getrusage``, the answer without ``/proc``, counts from before ``exec``: a process that was
    started by a large one begins with the peak of that one.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB$", host.text("/proc/self/status") or "", re.MULTILINE)
    if found:
        return 1024 * int(found[1])
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def return_freed_memory() -> None:
    """Give freed heap memory back to the system, which glibc keeps for each thread."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def memory_of(host: Host) -> Memory:
    """Return memory and swap from ``/proc``, else the installed memory from ``sysconf``."""
    known = linux_memory_of(host)
    if known is not None:
        return known
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Memory(total_bytes=installed, available_bytes=installed, swap_bytes=0, zram_bytes=0)


def linux_memory_of(host: Host) -> Memory | None:
    """Return memory and swap from ``/proc`` and the control groups; None without MemAvailable."""
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
    """Yield the free bytes of each limited control group of this process."""
    for version, folder in group_folders(host, "memory"):
        limit_file, used_file, cache_name = _GROUP_FILES[version]
        limit, used = (host.number(f"{folder}/{name}") for name in (limit_file, used_file))
        if limit is None or used is None:
            continue
        stat = host.text(f"{folder}/memory.stat") or ""
        cache = re.search(rf"^{cache_name} (\d+)$", stat, re.MULTILINE)
        yield max(0, limit - used + (int(cache[1]) if cache else 0))


def swap_command(gibibytes: int) -> str:
    """Return the shell command that adds a swap file of a size in GiB."""
    file = "/swapfile"
    return (
        f"sudo fallocate -l {gibibytes}G {file} && sudo chmod 600 {file} && sudo mkswap {file} "
        f"&& sudo swapon {file}"
    )
