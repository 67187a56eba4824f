"""The process-wide TensorRT logger.

TensorRT keeps a pointer to the logger of the first builder or runtime and uses it for all others
until none is left. With a logger per engine, the second engine's errors would go to the first one's
logger, and to freed memory once the first engine is closed.
"""

from __future__ import annotations

import collections
import functools
from typing import Any

MOST_ERRORS = 4  # number of last errors kept; one failure may log several


@functools.cache
def error_log(trt: Any) -> Any:
    """Return the logger of a module, ``tensorrt`` or ``tensorrt_rtx``; it is never freed.

    Its ``take()`` returns the errors since the last ``take()``, joined, and clears them.
    """

    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        """Collects errors for the messages of our exceptions, and drops everything else."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: collections.deque[str] = collections.deque(maxlen=MOST_ERRORS)

        def log(self, severity: Any, msg: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self._errors.append(msg.strip())

        def take(self) -> str:
            errors = []
            while self._errors:  # another thread may pop from it at the same time
                errors.append(self._errors.popleft())
            return "; ".join(errors)

    return ErrorLog()
