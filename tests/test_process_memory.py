"""Memory of this process."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from tap_deploy.machine.host import Host
from tap_deploy.machine.memory import peak_rss_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

FRAGMENTED = """
import ctypes
from tap_deploy.machine.host import Host
from tap_deploy.machine.memory import return_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def resident():
    return int(Host().text("/proc/self/statm").split()[1]) * 4096

blocks = [libc.malloc(4000) for _ in range(20_000)]
for block in blocks:
    libc.memset(block, 1, 4000)
for block in blocks[:-1]:
    libc.free(block)  # all below a block in use
before = resident()
return_freed_memory()
print(before - resident())
"""


def test_freed_memory_is_returned():
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("not glibc")
    command = [sys.executable, "-c", FRAGMENTED]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) > 60_000_000


def test_the_peak_is_that_of_this_process_and_not_of_its_parent():
    ballast = bytearray(200_000_000)
    code = (
        "from tap_deploy.machine.host import Host\n"
        "from tap_deploy.machine.memory import peak_rss_bytes\n"
        "print(peak_rss_bytes(Host()))"
    )
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(ballast) < peak_rss_bytes(Host())
    assert 5_000_000 < int(child.stdout) < len(ballast)
