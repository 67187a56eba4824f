"""A server in a thread of the test, and a client without a library."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import queue
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tap_deploy.predictor import TapPredictor
from tap_deploy.server.options import ServeOptions
from tap_deploy.server.running import serve
from tap_deploy.server.service import ServedModel, Service

MODEL = ServedModel(name="tap_demo", backend="onnxruntime", precision="fp32")


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer to ``Served.ask``."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def detail(self) -> str:
        """The line that says what is wrong."""
        assert self.headers["content-type"] == "application/problem+json"
        problem = self.json()
        assert problem["status"] == self.status
        assert problem["request_id"] == self.headers["x-request-id"]
        return str(problem["detail"])


@dataclasses.dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
        address: ``http://127.0.0.1:PORT``.
        service: its threads.
    """

    address: str
    service: Service

    @property
    def port(self) -> int:
        port = urllib.parse.urlsplit(self.address).port
        assert port is not None
        return port

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send a request; a mapping is sent as JSON."""
        sent = dict(headers or {})
        if isinstance(body, Mapping):
            body = json.dumps(body).encode()
            sent.setdefault("content-type", "application/json")
        with contextlib.closing(self.connection()) as connection:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())

    def upload(self, content: bytes) -> str:
        """Upload a picture; returns its id."""
        answer = self.ask("POST", "/v1/images", content, {"content-type": "image/png"})
        assert answer.status == 201, answer.body
        return str(answer.json()["image_id"])


@contextlib.contextmanager
def served(open_predictor: Callable[[], TapPredictor], **options: Any) -> Iterator[Served]:
    """Serve until the end of the block, on a free port."""
    service = Service(open_predictor, MODEL, ServeOptions(**({"port": 0} | options)))
    told: queue.Queue[str | BaseException] = queue.Queue()

    def run() -> None:
        try:
            serve(service, told.put)
        except BaseException as exc:
            told.put(exc)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        first = told.get(timeout=120)
        if isinstance(first, BaseException):
            raise first
        yield Served(first, service)
    finally:
        service.stop_serving()
        thread.join(timeout=120)
        assert not thread.is_alive()
    if not told.empty():
        raise AssertionError(told.get())


def multipart(picture: bytes, request: str) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of a one-shot request."""
    boundary = "a-boundary"
    parts = (
        (b'name="image"; filename="photo.png"\r\ncontent-type: image/png', picture),
        (b'name="request"', request.encode()),
    )
    body = b"".join(
        b"--%s\r\ncontent-disposition: form-data; %s\r\n\r\n%s\r\n"
        % (boundary.encode(), head, content)
        for head, content in parts
    )
    body += b"--%s--\r\n" % boundary.encode()
    return body, {"content-type": f"multipart/form-data; boundary={boundary}"}


def events_of(body: bytes) -> list[tuple[str, Any]]:
    """The server-sent events of a body: name and data."""
    found = []
    for block in body.decode().split("\n\n"):
        if block:
            name, data = block.split("\n")
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found
