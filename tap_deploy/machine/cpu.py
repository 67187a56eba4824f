"""CPU: its name, the number of usable CPUs, and its instructions for int8 and bf16."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterator, Set

from tap_deploy.machine.cgroups import group_folders
from tap_deploy.machine.host import Host

# CPU flag of an x86 instruction set with int8 products accumulated in int32 -> its name, fastest
# first.
_EXACT_INT8 = {"amx_int8": "AMX", "avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI"}
NO_VNNI = "no VNNI"
# CPU flags of instructions that multiply bf16: of x86 and, the last one, of Arm.
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}


def cpu_name(host: Host) -> str:
    """Return the name of the processor."""
    match = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(host), re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def usable_cpus(host: Host | None = None, allowed: Set[int] | None = None) -> int:
    """Return the number of CPUs that this process can use, at least 1.

    Args:
        host: the machine; None for this one.
        allowed: CPUs that it may run on; None for the affinity mask of this thread, which
            ``taskset`` and cpusets of containers set.

    Returns:
        The number of allowed CPUs, or the smallest quota of its control groups, rounded up, if
        that is lower.
    """
    host, allowed = host or Host(), _allowed_cpus() if allowed is None else allowed
    return max(1, min(len(allowed), math.ceil(min(_quotas(host), default=len(allowed)))))


def usable_cores(host: Host | None = None, allowed: Set[int] | None = None) -> int:
    """Return the number of physical cores that this process can use, at least 1.

    Like ``usable_cpus``, but hardware threads of one core count once: one thread of a matrix
    product saturates a core.
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
    """Yield the CPU quota of each limited control group of this process, CPUs."""
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
    """Return the int8 instruction set of an x86 CPU, ``NO_VNNI`` without one.

    Without one, pairs of products are accumulated in int16, which may saturate; see
    ``docs/int8.md``. None for other CPUs, and if the CPU flags are unknown.
    """
    match = re.search(r"^flags\s*:", _cpuinfo(host), re.MULTILINE)
    if match is None:
        return None
    flags = cpu_flags(host)
    return next((name for flag, name in _EXACT_INT8.items() if flag in flags), NO_VNNI)


def cpu_has_bf16(host: Host) -> bool:
    """Return whether the CPU multiplies bf16; False if its flags are unknown."""
    return bool(cpu_flags(host) & _BF16)


def cpu_flags(host: Host) -> Set[str]:
    """Return the names of the instruction sets of the CPU; empty if they are unknown."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(host), re.MULTILINE)
    return set(match[1].split()) if match else set()


def _cpuinfo(host: Host) -> str:
    return host.text("/proc/cpuinfo") or ""
