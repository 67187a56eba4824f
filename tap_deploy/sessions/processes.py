"""Objects that work only in the process that made them: models with threads or a GPU.

A fork copies the memory of a process, but neither its threads nor its way to the GPU. In the
child a call would wait for threads that are not there, and so would freeing.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any, NoReturn, TypeVar

from tap_deploy.errors import SessionError

REMEDY = (
    "load the bundle in the process that uses it: with gunicorn in post_fork or without --preload, "
    "in a worker of a DataLoader in worker_init_fn, in an actor of Ray in __init__; "
    "see docs/runtime.md"
)


Self = TypeVar("Self", bound="ProcessBound")


class ProcessBound:
    """Base of what must neither be used nor freed in another process.

    A forked child never frees it: the memory is shared with the parent anyway.
    """

    _made_in: int

    def __new__(cls: type[Self], *args: Any, **options: Any) -> Self:
        """Remember the process."""
        self = super().__new__(cls)
        self._made_in = os.getpid()
        _alive.add(self)
        return self

    @property
    def is_of_another_process(self) -> bool:
        """Whether this process was forked from the one that made it."""
        return os.getpid() != self._made_in

    def require_own_process(self) -> None:
        """Refuse to be used.

        Raises:
            SessionError: this process did not make it.
        """
        if self.is_of_another_process:
            raise SessionError(
                f"a model that was loaded in process {self._made_in} cannot be used in process "
                f"{os.getpid()}, which was forked from it; {REMEDY}"
            )

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or deeply copied.

        Raises:
            SessionError: always.
        """
        raise SessionError(f"a loaded model cannot be pickled or copied; {REMEDY}")


_alive: weakref.WeakSet[ProcessBound] = weakref.WeakSet()


def _keep_for_ever() -> None:
    """Leak one reference to each object, so that a forked child never frees it."""
    for thing in list(_alive):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


if hasattr(os, "register_at_fork"):  # where there are forks
    os.register_at_fork(after_in_child=_keep_for_ever)
