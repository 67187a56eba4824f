"""The ``openvino.Core`` of this process, and tensors on arrays."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import numpy as np

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


def tensor_from_array(openvino: Any, array: np.ndarray) -> Any:
    """Wrap an array without a copy; it may be read-only, which ``openvino.Tensor`` refuses.

    The tensor does not keep a read-only array alive.
    """
    if not array.flags.writeable:
        memory = (ctypes.c_char * array.nbytes).from_address(array.ctypes.data)
        array = np.ndarray(array.shape, array.dtype, memoryview(memory))
    return openvino.Tensor(array, shared_memory=True)
