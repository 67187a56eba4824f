"""Times calls on the GPU, with events in a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tap_deploy.sessions.gpu.memory import DeviceMemory


class Stopwatch:
    """Time on the GPU between the first and the last work of a call in one stream.

    Includes copies, and gaps in which the GPU waits for the host. CUDA must be activated.
    """

    def __init__(self, memory: DeviceMemory, stream: int) -> None:
        self._memory, self._stream = memory, stream
        self._events: tuple[Any, Any] | None = None

    def time(self, call: Callable[[], object]) -> object:
        """Run a call between two events, wait for the stream, and return the call's result."""
        if self._events is not None:  # of a call whose time nobody asked for
            self.elapsed_ms()
        start = self._memory.record_event(self._stream)
        try:
            return call()
        finally:
            self._events = (start, self._memory.record_event(self._stream))
            self._memory.synchronize(self._stream)

    def elapsed_ms(self) -> float:
        """Return the time of the last call, ms; once per call."""
        assert self._events is not None
        events, self._events = self._events, None
        return self._memory.elapsed_ms(*events)
