"""Protection of loaded models (threads, CUDA contexts) against use in forked processes.

A fork copies the memory of a process, but not its threads and its CUDA context. In the child, both
using and freeing a model would deadlock.
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
    """Base class of objects that may only be used and freed in the process that created them.

    A forked child never frees them; their memory is shared with the parent.
    """

    _made_in: int

    def __new__(cls: type[Self], *args: Any, **options: Any) -> Self:
        """Store the id of the current process."""
        self = super().__new__(cls)
        self._made_in = os.getpid()
        _alive.add(self)
        return self

    @property
    def is_of_another_process(self) -> bool:
        """Whether the object was created in another process, before a fork."""
        return os.getpid() != self._made_in

    def require_own_process(self) -> None:
        """Check that the current process created the object.

        Raises:
            SessionError: another process created it.
        """
        if self.is_of_another_process:
            raise SessionError(
                f"a model that was loaded in process {self._made_in} cannot be used in process "
                f"{os.getpid()}, which was forked from it; {REMEDY}"
            )

    def __reduce__(self) -> NoReturn:
        """Reject pickling and deep copies.

        Raises:
            SessionError: always.
        """
        raise SessionError(f"a loaded model cannot be pickled or copied; {REMEDY}")


_alive: weakref.WeakSet[ProcessBound] = weakref.WeakSet()


def _keep_for_ever() -> None:
    """Leak a reference to every live object, so that the forked child never frees it."""
    for thing in list(_alive):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


if hasattr(os, "register_at_fork"):  # POSIX only
    os.register_at_fork(after_in_child=_keep_for_ever)
