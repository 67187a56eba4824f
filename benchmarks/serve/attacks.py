"""Clients that mean harm: slow heads, half bodies, answers that nobody reads."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from benchmarks.serve.target import POLL_S, ProcessState, Target

Attack = Callable[[Target, ProcessState], Awaitable[dict[str, Any]]]

SLACK_S = 10.0  # beyond the time that the server gives its clients
OTHERS = 2  # connections of the client that goes on meanwhile
LONGEST_S = 300.0
HEAD = b"POST /v1/images HTTP/1.1\r\nHost: localhost\r\n"
SMALL_BUFFER = 4096
PIPELINED = 100


def slow_heads(connections: int, server_waits_s: float) -> Attack:
    """Return an attack that sends heads of requests, a byte a second, and never ends them."""

    async def attack(target: Target, before: ProcessState) -> dict[str, Any]:
        lasted = await asyncio.gather(*(_drip(target) for _ in range(connections)))
        freed = await target.freed(before, SLACK_S, connections=OTHERS)
        require(max(lasted) <= server_waits_s + SLACK_S, f"a head was let drip {max(lasted):.1f}s")
        return {"connections": connections, "longest_s": max(lasted), "freed_after_s": freed}

    return attack


def half_bodies(silent: int, closed: int, server_waits_s: float) -> Attack:
    """Return an attack that sends half of each body, and then nothing, or closes."""

    async def attack(target: Target, before: ProcessState) -> dict[str, Any]:
        await asyncio.gather(*(_half_body(target, closes=True) for _ in range(closed)))
        start = time.monotonic()
        ends = await asyncio.gather(*(_half_body(target, closes=False) for _ in range(silent)))
        spent = time.monotonic() - start
        freed = await target.freed(before, SLACK_S, connections=OTHERS)
        counts = dict(collections.Counter(ends))
        require(counts == {"408": silent}, f"half bodies were answered with {counts}")
        require(spent <= server_waits_s + SLACK_S, f"a half body was waited for {spent:.1f} s")
        return {"silent": silent, "closed": closed, "ends": counts, "longest_s": spent} | {
            "freed_after_s": freed
        }

    return attack


def deaf_clients(gets: int, posts: int, request: bytes, server_waits_s: float) -> Attack:
    """Return an attack that asks again and again on each connection, and reads no answer.

    Args:
        gets: connections that ask for the description of the server.
        posts: connections that send ``request``.
        request: with head and body.
        server_waits_s: the server's limit for a whole request, seconds.
    """
    description = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def attack(target: Target, before: ProcessState) -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            loop = asyncio.get_running_loop()
            for content in [description] * gets + [request] * posts:
                client = stack.enter_context(_deaf_socket())
                await loop.sock_connect(client, target.host_and_port)
                with contextlib.suppress(BlockingIOError):  # the server reads no more
                    client.send(content * PIPELINED)
            deadline = time.monotonic() + SLACK_S
            while (held := target.state().files - before.files) < gets + posts:
                require(time.monotonic() < deadline, f"the server has taken {held} connections")
                await asyncio.sleep(POLL_S)
            # With our ends still open.
            freed = await target.freed(before, 2 * server_waits_s + SLACK_S, connections=OTHERS)
        return {"connections": gets + posts, "held_files": held, "freed_after_s": freed}

    return attack


def regions_request(image_id: str, prompts: list[dict[str, Any]]) -> bytes:
    """Return a whole request for regions, head and body."""
    body = json.dumps({"prompts": prompts, "captions": False}).encode()
    return (
        f"POST /v1/images/{image_id}/regions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


async def _drip(target: Target) -> float:
    """Send a byte a second until the server closes; return how long that took, seconds."""
    start = time.monotonic()
    with contextlib.suppress(ConnectionError):
        async with _connection(target) as (reader, writer):
            writer.write(HEAD + b"X-Slow: ")
            while time.monotonic() < start + LONGEST_S:
                try:
                    if not await asyncio.wait_for(reader.read(1), 1.0):
                        break
                except asyncio.TimeoutError:
                    writer.write(b"a")
                    await writer.drain()
    return time.monotonic() - start


async def _half_body(target: Target, *, closes: bool) -> str:
    """Send half of a body; return the status of the answer, or how the connection ended."""
    try:
        async with _connection(target) as (reader, writer):
            content = bytes(50_000)
            writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % (2 * len(content)) + content)
            await writer.drain()
            if closes:
                return "closed"
            answer = await asyncio.wait_for(reader.read(), LONGEST_S)
            return answer[9:12].decode() or "cut off"
    except ConnectionError:
        return "cut off"


@contextlib.asynccontextmanager
async def _connection(
    target: Target,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(*target.host_and_port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def _deaf_socket() -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    client.setblocking(False)
    return client


def require(holds: bool, message: str) -> None:
    """Raise ``AttackSucceeded`` unless the server has defended itself."""
    if not holds:
        raise AttackSucceeded(message)


class AttackSucceeded(Exception):
    """The server did not defend itself; the message says how."""
