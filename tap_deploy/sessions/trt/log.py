"""The logger of TensorRT: one for the process, as TensorRT keeps a pointer to a single one.

The first logger that a builder or runtime brings is used for all that follow, until none of them
is left. A logger per engine would miss the errors of the second engine, and be gone while the
second one still writes to it, if the first is closed before.
"""

from __future__ import annotations

import collections
import functools
from typing import Any

MOST_ERRORS = 4  # the last ones; one failure may log several


@functools.cache
def error_log(trt: Any) -> Any:
    """Return the logger of a module, ``tensorrt`` or ``tensorrt_rtx``; it is never freed.

    ``take()`` returns the errors since the last ``take()``, joined, and forgets them.
    """

    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        """Keeps errors, so that they can be part of ours; the rest is noise."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: collections.deque[str] = collections.deque(maxlen=MOST_ERRORS)

        def log(self, severity: Any, msg: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self._errors.append(msg.strip())

        def take(self) -> str:
            errors = []
            while self._errors:  # another thread may take, too
                errors.append(self._errors.popleft())
            return "; ".join(errors)

    return ErrorLog()
