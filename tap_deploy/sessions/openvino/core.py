"""The ``openvino.Core`` of this process."""

from __future__ import annotations

import functools
import threading
from typing import Any

DEVICE = "CPU"

_LOCK = threading.Lock()


def shared_core(openvino: Any) -> Any:
    """Return the core, which exists until the process ends.

    The CPU plugin gives the thread that loads it a signal stack, and unmaps that when the last
    core and graph are gone. If this happens in another thread, the first one keeps the address,
    and the next signal that Python handles, such as Ctrl-C, ends the process.
    """
    with _LOCK:
        return _core(openvino)


@functools.cache
def _core(openvino: Any) -> Any:
    return openvino.Core()
