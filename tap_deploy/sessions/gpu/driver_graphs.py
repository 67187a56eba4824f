"""CUDA graphs through the driver library, for pycuda, which does not support them.

No released pycuda (the newest is 2026.1) can capture streams. Driver handles are valid in the whole
process, so the driver library can capture streams created by pycuda.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any

from tap_deploy.errors import SessionError

LIBRARY = "libcuda.so.1"
THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_HANDLE, _HANDLE_POINTER = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
# Declarations from cuda.h; drivers of CUDA 11.4 and later have all of them.
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cuStreamBeginCapture_v2": (_HANDLE, ctypes.c_int),
    "cuStreamEndCapture": (_HANDLE, _HANDLE_POINTER),
    "cuGraphInstantiateWithFlags": (_HANDLE_POINTER, _HANDLE, ctypes.c_ulonglong),
    "cuGraphLaunch": (_HANDLE, _HANDLE),
    "cuGraphExecDestroy": (_HANDLE,),
    "cuGraphDestroy": (_HANDLE,),
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}


def load_driver() -> Any:
    """Load the driver library.

    Raises:
        OSError: the library is missing.
    """
    return ctypes.CDLL(LIBRARY)


class DriverGraphs:
    """Captures and launches CUDA graphs; a context must be current in the thread.

    Raises:
        SessionError: from any method, if a CUDA call fails; one line with CUDA's error name.
    """

    def __init__(self) -> None:
        try:
            driver = load_driver()
            self._functions = {name: getattr(driver, name) for name in _ARGUMENTS}
        except (OSError, AttributeError) as exc:  # AttributeError: the driver is too old
            raise SessionError(f"CUDA: {LIBRARY} cannot be used: {exc}; update the driver") from exc
        for name, function in self._functions.items():
            function.argtypes, function.restype = _ARGUMENTS[name], ctypes.c_int

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        """Capture the work that ``enqueue`` puts into the stream; return the graph's handle."""
        self._call("cuStreamBeginCapture_v2", stream, THREAD_LOCAL)
        try:
            enqueue()
        except BaseException:
            # Leave capture mode; CUDA reports the invalid capture again, which is not news.
            with contextlib.suppress(SessionError):
                self._call("cuGraphDestroy", self._ended(stream))
            raise
        graph, executable = self._ended(stream), _HANDLE()
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)
        return executable.value or 0

    def _ended(self, stream: int) -> ctypes.c_void_p:
        graph = _HANDLE()
        self._call("cuStreamEndCapture", stream, ctypes.byref(graph))
        return graph

    def launch(self, graph: int, stream: int) -> None:
        """Launch a CUDA graph."""
        self._call("cuGraphLaunch", graph, stream)

    def destroy(self, graph: int) -> None:
        """Destroy a CUDA graph."""
        self._call("cuGraphExecDestroy", graph)

    def _call(self, function: str, *arguments: Any) -> None:
        code = self._functions[function](*arguments)
        if code:
            text = ctypes.c_char_p()
            self._functions["cuGetErrorName"](code, ctypes.byref(text))
            name = text.value.decode() if text.value else f"error {code}"
            raise SessionError(f"CUDA: {function} failed: {name}")
