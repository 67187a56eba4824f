"""Runs the server: socket, event loop, slow clients, draining."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
import types
from collections.abc import Callable, Iterator

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tap_deploy.errors import InputError
from tap_deploy.server.app import build_app
from tap_deploy.server.logs import json_logs
from tap_deploy.server.options import ServeOptions
from tap_deploy.server.service import Service

logger = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_S = 5
DRAIN_S = 5  # beyond the longest time of a request


def serve(service: Service, on_ready: Callable[[str], None]) -> None:
    """Listen and answer until SIGTERM or Ctrl-C, then finish what was accepted.

    Args:
        service: answers the requests; it is started and closed here.
        on_ready: called with the address when the model is loaded; in another thread.

    Raises:
        InputError: the address cannot be used.
        TapError: the bundle cannot be loaded, or fails its self-test.
    """
    with _listening(service.options) as listener, json_logs():
        server = Server(_config(service))
        address = _address(listener)
        service.on_ready = lambda: on_ready(address)
        service.stop_serving = server.stop
        service.start()
        try:
            server.run(sockets=[listener])
        finally:
            service.close()
    if service.error is not None:
        raise service.error


class Server(uvicorn.Server):
    """Ends with exit code 0 after a signal: uvicorn would raise the signal again."""

    def stop(self) -> None:
        """Drain and end; from any thread."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
        """Drain at the first signal, end at the second."""
        self.force_exit = self.should_exit
        self.stop()


class PatientProtocol(H11Protocol):
    """HTTP/1.1 for clients that send the head of a request, and take an answer, within a time.

    Uvicorn waits for ever for a head that does not end, and for a client that does not read.
    """

    head_timeout_s = 20.0
    answer_timeout_s = 60.0
    max_connections = 512

    _since = 0.0  # of the connection or its last request, ``time.monotonic()``
    _head_timer: asyncio.TimerHandle | None = None
    _answer_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head; at the limit, give up the one waited for longest."""
        if len(self.connections) >= self.max_connections:
            self._make_room()
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # every byte that waits pauses the writing
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Stop waiting once a head is complete."""
        if self._head_timer is None and not self._is_answering():
            self._wait_for_head()
        super().data_received(data)
        if self._is_answering():
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_waiting()
        self._stop_writing_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Begin to wait until the client has taken what was sent, even after the last request."""
        super().pause_writing()
        self._stop_writing_timer()
        self._answer_timer = self.loop.call_later(self.answer_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop waiting for the client."""
        self._stop_writing_timer()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection."""
        self._stop_waiting()
        super().timeout_keep_alive_handler()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _make_room(self) -> None:
        """Close the oldest connection that waits for its client, if there is one."""
        own = [one for one in self.connections if isinstance(one, PatientProtocol)]
        waiting = [one for one in own if not one._is_answering() or one.cycle.more_body]
        if waiting:
            min(waiting, key=lambda one: one._since).transport.abort()

    def _wait_for_head(self) -> None:
        self._since = time.monotonic()
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_writing_timer(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()


def _config(service: Service) -> uvicorn.Config:
    options = service.options

    class Protocol(PatientProtocol):
        head_timeout_s = options.body_timeout_s
        answer_timeout_s = options.timeout_s
        max_connections = options.max_connections

    return uvicorn.Config(
        build_app(service),
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=options.max_connections + 1,  # it refuses from this number on
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=round(options.timeout_s) + DRAIN_S,
    )


@contextlib.contextmanager
def _listening(options: ServeOptions) -> Iterator[socket.socket]:
    """Yield a socket that listens.

    Raises:
        InputError: the address cannot be used.
    """
    try:
        found = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as exc:
        raise InputError(
            f"{options.host}, port {options.port}, cannot be listened on: {exc}; choose another "
            "--host or --port"
        ) from exc
    with listener:
        # Connections inherit it. asyncio sets it only where ``proto`` is TCP, and here it is 0:
        # the body of an answer would wait 40 ms for the client to acknowledge the head.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
