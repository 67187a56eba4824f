"""Lanes that are handed out call by call, and an end that waits for the calls."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from tap_deploy.errors import SessionError
from tap_deploy.sessions.processes import ProcessBound

Item = TypeVar("Item")


class LanePool(ProcessBound, Generic[Item]):
    """Hands out items; a caller waits while none is free. The one used last is warm, and next."""

    def __init__(self, items: Sequence[Item], closed_message: str, *, shared: bool = False) -> None:
        """Take the items; a shared one is for any number of calls at once."""
        self._idle, self._shared = list(items), shared
        self._closed_message = closed_message
        self._changed = threading.Condition()
        self._closed = self._ended = False
        self._holders: list[int] = []  # thread ids

    @contextlib.contextmanager
    def taken(self) -> Iterator[Item]:
        """Yield an item that nobody else has meanwhile, unless it is shared.

        Raises:
            SessionError: the pool is closed, or of another process.
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
            # A fork within a call: locks may be held by threads that the child does not have.
            if not self.is_of_another_process:
                with self._changed:
                    if not self._shared:
                        self._idle.append(item)
                    self._holders.remove(holder)
                    self._changed.notify_all()

    def require_free(self, what: str) -> None:
        """Refuse what waits for all items in a thread that holds one: it would wait for itself.

        Raises:
            SessionError: the calling thread holds an item, or the pool is of another process.
        """
        self.require_own_process()
        with self._changed:
            if threading.get_ident() in self._holders:
                raise SessionError(f"a predictor cannot be {what} from within its own call")

    def close(self) -> bool:
        """Hand out nothing any more, and wait for what is out.

        Returns:
            Whether what the items hold is now to be freed: False if it was closed before, and in
            a forked process, which has nothing to free.

        Raises:
            SessionError: the calling thread holds an item itself.
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
