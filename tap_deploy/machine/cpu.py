"""The processor, and how it multiplies int8."""

from __future__ import annotations

import platform
import re

from tap_deploy.machine.host import Host

# Flag of an x86 CPU that adds products of int8 in 32 bits -> what to call it; the quickest first.
_EXACT_INT8 = {"amx_int8": "AMX", "avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI"}
NO_VNNI = "no VNNI"


def cpu_name(host: Host) -> str:
    """Return the name of the processor."""
    match = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(host), re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


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
