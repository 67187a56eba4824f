"""What stands before every route: tokens, foreign pages, the queue, deadlines, the log."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import math
import re
import time
import urllib.parse
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tap_deploy.server.bodies import BodyReader, ClientGone
from tap_deploy.server.exchange import DEADLINE, Exchange
from tap_deploy.server.problems import Problem, problem_of
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
FOREIGN = Problem(status=403, detail="pages of other sites may not ask a server without a token")
CLIENT_GONE = 499  # in logs and metrics; nobody reads this answer
GRACE_S = 1.0  # for a stream to say that its deadline has passed
_MAX_RETRY_S = 60
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


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
        if self._options.token is None and self._is_foreign(headers):
            return FOREIGN
        if not _is_open(path) and not self._knows_token(headers):
            return Problem(
                status=401,
                detail="expected the header Authorization: Bearer TOKEN",
                headers={"www-authenticate": "Bearer"},
            )
        return None if self._service.ready or not path.startswith(MODEL_ROUTES) else STARTING

    def _is_foreign(self, headers: Headers) -> bool:
        """Whether a page of another site asks, perhaps under a name that leads to this machine."""
        origin = headers.get("origin")
        try:
            host = urllib.parse.urlsplit(f"//{headers.get('host', '')}")
            asking = host.netloc if origin is None else urllib.parse.urlsplit(origin).netloc
            named = host.hostname
        except ValueError:  # brackets of an IPv6 address that do not close
            return True
        return asking != host.netloc or (self._options.is_loopback and named not in _LOCAL_HOSTS)

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
        body = await self._bodies.read(scope["path"], headers, receive, problem=self._full())
        if isinstance(body, Problem):
            return body
        with contextlib.closing(body):
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
        self._service.pending = len(self._running)
        exchange.on_end = lambda: self._leave(exchange)
        scope[DEADLINE] = time.monotonic() + timeout
        gone = asyncio.ensure_future(_gone(receive))
        answer = asyncio.ensure_future(self._routes(scope, _once(content, gone), exchange))
        try:
            await _first_of(answer, gone, timeout)
            if exchange.status is not None and not answer.done():
                await _first_of(answer, gone, GRACE_S)
            if answer.done():
                return answer.result()
            if gone.done():
                raise ClientGone
            if exchange.status is None:
                return _late(timeout)
            exchange.status = _late(timeout).status  # of an answer that is cut off
            return None
        finally:
            answer.cancel()
            gone.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
            self._leave(exchange)
            self._average_s += 0.1 * (exchange.seconds - self._average_s)

    async def _routes(self, scope: Scope, receive: Receive, exchange: Exchange) -> Problem | None:
        """Run the routes; a bug of this program becomes a problem and a line in the log."""
        try:
            await self._app(scope, receive, exchange.send)
        except Exception as exc:
            fields = {"request_id": exchange.request_id}
            logger.error("internal error", exc_info=exc, extra={"fields": fields})
            return problem_of(exc) if exchange.status is None else None
        return None

    def _leave(self, exchange: Exchange) -> None:
        self._running.discard(exchange)
        self._service.pending = len(self._running)

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


def _is_open(path: str) -> bool:
    """Whether a path needs no token."""
    return path in (PAGE, LIVE, READY) or path.startswith(PAGE_FILES)


def _late(timeout: float) -> Problem:
    return Problem(status=504, detail=f"not done within {timeout:g} s; ask for less at once")


async def _first_of(
    one: asyncio.Future[Problem | None], other: asyncio.Future[None], timeout: float
) -> None:
    futures: set[asyncio.Future[Any]] = {one, other}
    await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)


async def _gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _once(content: bytes, gone: asyncio.Future[None]) -> Receive:
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
