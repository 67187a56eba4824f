"""The processor: how much of it a process may use, and how it multiplies int8."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterator, Set

from tap_deploy.machine.cgroups import group_folders
from tap_deploy.machine.host import Host

# Flag of an x86 CPU that adds products of int8 in 32 bits -> what to call it; the quickest first.
_EXACT_INT8 = {"amx_int8": "AMX", "avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI"}
NO_VNNI = "no VNNI"


def cpu_name(host: Host) -> str:
    """Return the name of the processor."""
    match = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(host), re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def usable_cpus(host: Host | None = None, allowed: Set[int] | None = None) -> int:
    """Return how many CPUs this process may keep busy, at least 1.

    Args:
        host: the machine; None for this one.
        allowed: numbers of the CPUs that it may run on; None for those of this thread, which
            ``taskset`` and the cpusets of containers set.

    Returns:
        The number of these CPUs, or what the quotas of its control groups come to, rounded up.
    """
    host, allowed = host or Host(), _allowed_cpus() if allowed is None else allowed
    return max(1, min(len(allowed), math.ceil(min(_quotas(host), default=len(allowed)))))


def usable_cores(host: Host | None = None, allowed: Set[int] | None = None) -> int:
    """Return how many cores this process may keep busy, at least 1.

    As ``usable_cpus``, but CPUs that are threads of one core count once: a product of matrices
    fills a core with one thread.
    """
    host, allowed = host or Host(), _allowed_cpus() if allowed is None else allowed
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = {host.text(topology.format(cpu)) or f"only {cpu}" for cpu in allowed}
    return min(max(1, len(cores)), usable_cpus(host, allowed))


def _allowed_cpus() -> Set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _quotas(host: Host) -> Iterator[float]:
    """Yield how many CPUs each control group of this process may use, where it is limited."""
    for version, folder in group_folders(host, "cpu"):
        quota = _quota_v1(host, folder) if version == 1 else _quota_v2(host, folder)
        if quota is not None:
            yield quota


def _quota_v1(host: Host, folder: str) -> float | None:
    quota, period = (host.number(f"{folder}/cpu.cfs_{name}_us") for name in ("quota", "period"))
    return quota / period if quota and period and quota > 0 else None  # -1: no limit


def _quota_v2(host: Host, folder: str) -> float | None:
    limit = re.fullmatch(r"(\d+) (\d+)", host.text(f"{folder}/cpu.max") or "")
    return int(limit[1]) / int(limit[2]) if limit else None  # "max 100000": no limit


def cpu_int8(host: Host) -> str | None:
    """Return how an x86 CPU multiplies int8, ``NO_VNNI`` if it has no instruction for that.

    Without one, products are added up in 16 bits, where two of them may not fit; see
    ``docs/int8.md``. None for other CPUs, and where the flags are not known.
    """
    match = re.search(r"^flags\s*:\s*(.+)$", _cpuinfo(host), re.MULTILINE)
    if match is None:
        return None
    flags = set(match[1].split())
    return next((name for flag, name in _EXACT_INT8.items() if flag in flags), NO_VNNI)


def _cpuinfo(host: Host) -> str:
    return host.text("/proc/cpuinfo") or ""
