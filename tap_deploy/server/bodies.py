"""Reading the bodies of requests, within bounds of size, time, and memory of all of them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import Receive

from tap_deploy.server.options import JSON_ROUTES, MAX_JSON_BYTES, ServeOptions
from tap_deploy.server.problems import Problem

BODIES_IN_MEMORY = 8  # of the largest size


class ClientGone(Exception):
    """The client has closed the connection."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Body:
    """A body in memory.

    Attributes:
        content: its bytes.
        close: counts the memory as free.
    """

    content: bytes
    close: Callable[[], None]


class BodyReader:
    """Reads whole bodies; those that are refused are read to their end and thrown away.

    A client that is answered and cut off while it still sends may never see the answer.
    """

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._free = BODIES_IN_MEMORY * options.max_body_bytes

    async def read(
        self, path: str, headers: Headers, receive: Receive, *, problem: Problem | None
    ) -> Body | Problem:
        """Read a body.

        Args:
            path: of the request.
            headers: of the request.
            receive: of the request.
            problem: what will be answered whatever the body holds; None if it is wanted.

        Raises:
            ClientGone: the connection ended before the body.
        """
        most = self._options.max_body_bytes
        if path.startswith(JSON_ROUTES):
            most = min(MAX_JSON_BYTES, most)
        reading = _Reading(self, most, problem or _problem_of(headers, most))
        deadline = time.monotonic() + self._options.body_timeout_s
        try:
            while await self._part(reading, receive, deadline):
                pass
        except BaseException:
            reading.discard()
            raise
        if reading.problem is not None:
            reading.discard()
            return reading.problem
        content, reading.parts = b"".join(reading.parts), []
        return Body(content=content, close=reading.discard)

    async def _part(self, reading: _Reading, receive: Receive, deadline: float) -> bool:
        """Read a part of a body; return whether there is more."""
        try:
            message = await asyncio.wait_for(receive(), deadline - time.monotonic())
        except asyncio.TimeoutError:
            seconds = self._options.body_timeout_s
            reading.problem = Problem(
                status=408,
                detail=f"the body did not arrive within {seconds:g} s",
                headers={"connection": "close"},
            )
            return False
        if message["type"] == "http.disconnect":
            raise ClientGone
        reading.add(message.get("body", b""))
        return bool(message.get("more_body", False))

    def take(self, count: int) -> bool:
        """Count memory as used; return False if there is not enough."""
        if count > self._free:
            return False
        self._free -= count
        return True

    def give(self, count: int) -> None:
        """Count memory as free."""
        self._free += count


def _problem_of(headers: Headers, most: int) -> Problem | None:
    """Return why a body is refused by its head."""
    if headers.get("content-encoding", "identity") != "identity":
        return Problem(status=415, detail="content-encoding: expected none")
    return _too_large(most) if int(headers.get("content-length", "0")) > most else None


def _too_large(most: int) -> Problem:
    return Problem(status=413, detail=f"the body is too large; expected at most {most} bytes")


class _Reading:
    """The parts of a body that have arrived."""

    def __init__(self, reader: BodyReader, most: int, problem: Problem | None) -> None:
        self._reader, self._most, self.problem = reader, most, problem
        self.parts: list[bytes] = []
        self._size = 0

    def add(self, part: bytes) -> None:
        """Keep a part, unless the body is refused."""
        if self.problem is not None:
            return
        if self._size + len(part) > self._most:
            self.problem = _too_large(self._most)
        elif not self._reader.take(len(part)):
            self.problem = Problem(
                status=429,
                detail="too many large bodies at a time; try again later",
                headers={"retry-after": "1"},
            )
        else:
            self.parts.append(part)
            self._size += len(part)
            return
        self.discard()

    def discard(self) -> None:
        """Throw the parts away."""
        self._reader.give(self._size)
        self.parts, self._size = [], 0
