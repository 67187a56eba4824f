"""A request and its answer: id, headers, status, time."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Scope, Send

DEADLINE = "deadline"  # in the scope of a request: ``time.monotonic()`` when it must be answered

PART_BYTES = 1 << 16
_SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


class Exchange:
    """A request and its answer.

    Attributes:
        request_id: the client's, if it sent one, or a random one.
        status: of the answer; None before it begins.
        on_end: called before the last part of the answer is sent.
    """

    def __init__(self, scope: Scope, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        is_id = re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given)
        self.request_id = given if is_id else secrets.token_hex(8)
        self.status: int | None = None
        self.on_end: Callable[[], None] = lambda: None
        scope["request_id"] = self.request_id
        self._send, self._started = send, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time since the head of the request, seconds."""
        return time.perf_counter() - self._started

    async def send(self, message: Message) -> None:
        """Send a part of the answer, with the headers that all answers have."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            for name, value in _SECURITY_HEADERS.items():
                headers.setdefault(name, value)
        elif not message.get("more_body", False):
            message = await self._send_all_but_the_end(message)
            # A client that has its answer may ask again before this call returns.
            self.on_end()
        await self._send(message)

    async def _send_all_but_the_end(self, message: Message) -> Message:
        """Send the last part of an answer but for its last bytes; return a message with those.

        Uvicorn waits before a part until the client has taken the one before it, and never after:
        a large answer in one part would be in memory when its request has long ended.
        """
        body = memoryview(message.get("body", b""))
        while len(body) > PART_BYTES:
            part = {**message, "body": bytes(body[:PART_BYTES]), "more_body": True}
            await self._send(part)
            body = body[PART_BYTES:]
        return {**message, "body": bytes(body)}
