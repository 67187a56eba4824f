"""CUDA graphs through the driver's own library, for a package that has none.

No released pycuda (2026.1 is the newest) records streams. The driver's handles are the same for
everyone in the process, so that streams of pycuda can be recorded beside it.
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
# cuda.h; all of them are in the drivers of CUDA 11.4 and later.
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
    """Load the driver's library.

    Raises:
        OSError: it is not there.
    """
    return ctypes.CDLL(LIBRARY)


class DriverGraphs:
    """Records streams and replays what was recorded; a context must be current in the thread.

    Raises:
        SessionError: CUDA refused, whatever the method; one line with CUDA's name for it.
    """

    def __init__(self) -> None:
        try:
            driver = load_driver()
            self._functions = {name: getattr(driver, name) for name in _ARGUMENTS}
        except (OSError, AttributeError) as exc:  # AttributeError: an older driver
            raise SessionError(f"CUDA: {LIBRARY} cannot be used: {exc}; update the driver") from exc
        for name, function in self._functions.items():
            function.argtypes, function.restype = _ARGUMENTS[name], ctypes.c_int

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        """Record what ``enqueue`` puts into the stream; return the handle of the graph."""
        self._call("cuStreamBeginCapture_v2", stream, THREAD_LOCAL)
        try:
            enqueue()
        except BaseException:
            # Leave capture mode; that the capture was spoilt is known already.
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
        """Replay a graph."""
        self._call("cuGraphLaunch", graph, stream)

    def destroy(self, graph: int) -> None:
        """Give a graph back."""
        self._call("cuGraphExecDestroy", graph)

    def _call(self, function: str, *arguments: Any) -> None:
        code = self._functions[function](*arguments)
        if code:
            text = ctypes.c_char_p()
            self._functions["cuGetErrorName"](code, ctypes.byref(text))
            name = text.value.decode() if text.value else f"error {code}"
            raise SessionError(f"CUDA: {function} failed: {name}")
