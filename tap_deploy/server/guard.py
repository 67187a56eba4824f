"""What stands before every route: request ids, logs, headers, tokens, limits, deadlines."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import re
import secrets
import time
import urllib.parse
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tap_deploy.server.bodies import BodyReader, ClientGone
from tap_deploy.server.problems import Problem
from tap_deploy.server.service import Service

logger = logging.getLogger(__name__)

PAGE, LIVE, READY = "/", "/v2/health/live", "/v2/health/ready"
PAGE_FILES = "/page/"
MODEL_ROUTES = ("/v1/", "/v2/models/")  # nothing of these works before the model is loaded

TIMEOUT_HEADER = "x-request-timeout-ms"
STARTING = Problem(
    status=503,
    detail="the model is still being loaded and tested; try again",
    headers={"retry-after": "2"},
)
CLIENT_GONE = 499  # in logs and metrics; nobody reads this answer
_MAX_RETRY_S = 60
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware around the routes.

    Args:
        app: the routes.
        service: what they ask.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._options, self._metrics = service.options, service.metrics
        self._bodies = BodyReader(service.options)
        self._running: set[Exchange] = set()
        self._average_s = 1.0  # of the time of a request, over the last ones

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, send)
        try:
            problem = self._refusal(scope) or await self._answer(scope, receive, exchange)
            if problem is not None:
                self._metrics.rejected.labels(str(problem.status)).inc()
                response = problem.response(scope["path"], exchange.request_id)
                await response(scope, receive, exchange.send)
        except ClientGone:
            exchange.status = CLIENT_GONE
        finally:
            self._note(scope, exchange)

    def _refusal(self, scope: Scope) -> Problem | None:
        """Return why a request is refused by its head alone."""
        headers, path = Headers(scope=scope), scope["path"]
        host = urllib.parse.urlsplit(f"//{headers.get('host', '')}")
        if self._options.is_loopback and host.hostname not in _LOCAL_HOSTS:
            # A foreign page, whose name somebody lets point to this machine.
            return Problem(status=403, detail="expected localhost as the host of the address")
        origin = headers.get("origin") if self._options.token is None else None
        if origin is not None and urllib.parse.urlsplit(origin).netloc != host.netloc:
            return Problem(status=403, detail="pages of other sites may not ask this server")
        if not _is_open(path) and not self._knows_token(headers):
            return Problem(
                status=401,
                detail="expected the header Authorization: Bearer TOKEN",
                headers={"www-authenticate": "Bearer"},
            )
        return None if self._service.ready or not path.startswith(MODEL_ROUTES) else STARTING

    def _knows_token(self, headers: Headers) -> bool:
        if self._options.token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        expected = self._options.token.encode()
        # In constant time: how long it takes must not tell how much of the token is right.
        right = hmac.compare_digest(given.strip().encode(), expected)
        return scheme.lower() == "bearer" and right

    async def _answer(self, scope: Scope, receive: Receive, exchange: Exchange) -> Problem | None:
        """Let the routes answer, or return what is in the way."""
        if scope["method"] != "POST":
            await self._app(scope, receive, exchange.send)
            return None
        headers = Headers(scope=scope)
        timeout = self._timeout(headers)
        if isinstance(timeout, Problem):
            return timeout
        body = await self._bodies.read(headers, receive, problem=self._full())
        if isinstance(body, Problem):
            return body
        with body:
            full = self._full()
            if full is not None:
                return full
            return await self._run(scope, body.content, receive, exchange, timeout)

    def _timeout(self, headers: Headers) -> float | Problem:
        """Return the time for a request, seconds; a client may set less than the server's."""
        text = headers.get(TIMEOUT_HEADER)
        if text is None:
            return self._options.timeout_s
        if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
            return Problem(status=422, detail=f"{TIMEOUT_HEADER}: expected milliseconds, 1 or more")
        return min(self._options.timeout_s, int(text) / 1000)

    def _full(self) -> Problem | None:
        """Return the answer to a request that finds no room; None if there is room."""
        if len(self._running) < self._options.max_pending:
            return None
        seconds = math.ceil(self._average_s)  # after that, those that wait now are answered
        return Problem(
            status=429,
            detail=f"{len(self._running)} requests are waiting already; try again later",
            headers={"retry-after": str(min(seconds, _MAX_RETRY_S))},
        )

    async def _run(
        self, scope: Scope, content: bytes, receive: Receive, exchange: Exchange, timeout: float
    ) -> Problem | None:
        """Run the routes until they are done, the deadline has passed, or the client is gone."""
        self._running.add(exchange)
        self._metrics.pending.set(len(self._running))
        # A client that has its answer may ask again before this method has ended.
        exchange.before_end = lambda: self._leave(exchange)
        gone = asyncio.ensure_future(_gone(receive))
        app = self._app(scope, _receive_once(content, gone), exchange.send)
        answer = asyncio.ensure_future(app)
        try:
            await asyncio.wait({answer, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
                return None
            if gone.done() or exchange.status is not None:  # an answer that has begun is cut off
                raise ClientGone
            return Problem(
                status=504, detail=f"not done within {timeout:g} s; ask for less at once"
            )
        finally:
            answer.cancel()
            gone.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
            self._leave(exchange)
            self._average_s += 0.1 * (exchange.seconds - self._average_s)

    def _leave(self, exchange: Exchange) -> None:
        self._running.discard(exchange)
        self._metrics.pending.set(len(self._running))

    def _note(self, scope: Scope, exchange: Exchange) -> None:
        """Log and count a request that has ended."""
        route, status = getattr(scope.get("route"), "path", "none"), exchange.status or 500
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(exchange.seconds)
        fields = {
            "request_id": exchange.request_id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "duration_ms": round(exchange.seconds * 1000, 1),
        }
        logger.info("request", extra={"fields": fields})


class Exchange:
    """A request and its answer.

    Attributes:
        request_id: the client's, if it sent one, or a random one.
        status: of the answer; None before it begins.
        before_end: called before the last part of the answer is sent.
    """

    def __init__(self, scope: Scope, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        is_id = re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given)
        self.request_id = given if is_id else secrets.token_hex(8)
        self.status: int | None = None
        self.before_end: Callable[[], None] = lambda: None
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
            self.before_end()
        await self._send(message)


def _is_open(path: str) -> bool:
    """Whether a path needs no token."""
    return path in (PAGE, LIVE, READY) or path.startswith(PAGE_FILES)


async def _gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _receive_once(content: bytes, gone: asyncio.Future[None]) -> Receive:
    """Return a ``receive`` that gives a whole body, and then waits for the end."""
    message: Message | None = {"type": "http.request", "body": content, "more_body": False}

    async def receive() -> Message:
        nonlocal message
        if message is not None:
            first, message = message, None
            return first
        await asyncio.wait({gone})
        return {"type": "http.disconnect"}

    return receive
