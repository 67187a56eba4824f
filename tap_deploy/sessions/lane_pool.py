"""A pool that lends lanes to calls, and waits for the calls when it is closed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from tap_deploy.errors import SessionError
from tap_deploy.sessions.processes import ProcessBound

Item = TypeVar("Item")


class LanePool(ProcessBound, Generic[Item]):
    """Lends items to callers, which wait while none is free.

    The most recently returned item is lent first, because it is warm.
    """

    def __init__(self, items: Sequence[Item], closed_message: str, *, shared: bool = False) -> None:
        """Store the items; with ``shared``, any number of calls use the same item at once."""
        self._idle, self._shared = list(items), shared
        self._closed_message = closed_message
        self._changed = threading.Condition()
        self._closed = self._ended = False
        self._holders: list[int] = []  # thread ids

    @contextlib.contextmanager
    def taken(self) -> Iterator[Item]:
        """Yield an item, exclusively unless it is shared.

        Raises:
            SessionError: the pool is closed, or was created in another process.
        """
        self.require_own_process()
        holder = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._idle or self._closed)
            if self._closed:
                raise SessionError(self._closed_message)
            item = self._idle[-1] if self._shared else self._idle.pop()
            self._holders.append(holder)
        try:
            yield item
        finally:
            # In a child forked during a call, threads that hold the lock do not exist.
            if not self.is_of_another_process:
                with self._changed:
                    if not self._shared:
                        self._idle.append(item)
                    self._holders.remove(holder)
                    self._changed.notify_all()

    def require_free(self, what: str) -> None:
        """Check that the calling thread holds no item; waiting for all items would deadlock.

        Raises:
            SessionError: the calling thread holds an item, or the pool was created in another
                process.
        """
        self.require_own_process()
        with self._changed:
            if threading.get_ident() in self._holders:
                raise SessionError(f"a predictor cannot be {what} from within its own call")

    def close(self) -> bool:
        """Stop lending and wait until all items are returned.

        Returns:
            Whether the caller must free the items: False if the pool was already closed, and in a
            forked process, which owns nothing.

        Raises:
            SessionError: the calling thread holds an item.
        """
        if self.is_of_another_process:
            return False
        self.require_free("closed")
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._holders)
            first, self._ended = not self._ended, True
            return first
