"""Lanes that are handed out one call at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from tap_deploy.errors import SessionError

Item = TypeVar("Item")


class LanePool(Generic[Item]):
    """Hands out items; who finds none waits. The one used last is handed out first: it is warm."""

    def __init__(self, items: Sequence[Item], closed_message: str) -> None:
        self._idle, self._total = list(items), len(items)
        self._closed_message = closed_message
        self._changed = threading.Condition()
        self._closed = False
        self._holders: list[int] = []  # thread ids

    @contextlib.contextmanager
    def taken(self) -> Iterator[Item]:
        """Yield an item that nobody else has meanwhile.

        Raises:
            SessionError: the pool is closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._idle or self._closed)
            if self._closed:
                raise SessionError(self._closed_message)
            item = self._idle.pop()
            self._holders.append(threading.get_ident())
        try:
            yield item
        finally:
            with self._changed:
                self._idle.append(item)
                self._holders.remove(threading.get_ident())
                self._changed.notify_all()

    def require_free(self, what: str) -> None:
        """Refuse what waits for all items in a thread that holds one: it would wait for itself.

        Raises:
            SessionError: the calling thread holds an item.
        """
        with self._changed:
            if threading.get_ident() in self._holders:
                raise SessionError(f"a predictor cannot be {what} from within its own call")

    def close(self) -> bool:
        """Hand out nothing any more, and wait for what is out; False if it was closed before.

        Raises:
            SessionError: the calling thread holds an item itself.
        """
        self.require_free("closed")
        with self._changed:
            first = not self._closed
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._idle) == self._total)
            return first
