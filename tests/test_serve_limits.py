"""What stands before the routes: tokens, hosts, sizes, times, the queue, slow clients, the end."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.errors import InputError, SessionError
from tap_deploy.predictor import TapPredictor
from tap_deploy.server.options import MIB, ServeOptions
from tap_deploy.server.running import serve
from tap_deploy.server.service import Service
from tests.served import MODEL, Served, events_of, served

TOKEN = "0123456789abcdef"


class Slow(TapPredictor):
    """A predictor that encodes when it is let, and raises what it is told to."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.encoding = threading.Semaphore(0)
        self.go = threading.Event()
        self.error = None

    def encode(self, image):
        self.encoding.release()
        assert self.go.wait(60)
        if self.error is not None:
            raise self.error
        return super().encode(image)


@pytest.fixture
def slow(micro_bundle: Bundle) -> Iterator[Slow]:
    predictor = Slow.from_bundle(micro_bundle.path, check_hashes=False)
    yield predictor
    predictor.close()


@pytest.fixture(scope="module")
def picture(pictures) -> bytes:
    content: bytes = (pictures / "a.png").read_bytes()
    return content


@pytest.fixture(scope="module")
def server(micro_bundle: Bundle) -> Iterator[Served]:
    with served(lambda: TapPredictor.from_bundle(micro_bundle.path), max_body_bytes=MIB) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(micro_bundle: Bundle) -> Iterator[Served]:
    with served(lambda: TapPredictor.from_bundle(micro_bundle.path), token=TOKEN) as running:
        yield running


def in_threads(count, call):
    """Run a call in threads; returns them and the list that its results come in."""
    results = []
    threads = [threading.Thread(target=lambda: results.append(call())) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, results


def test_every_answer_has_an_id_and_the_headers_of_a_page_that_loads_nothing_foreign(server):
    for path in ("/", "/v1/model", "/nothing", "/metrics", "/v2/health/live"):
        answer = server.ask("GET", path)
        assert re.fullmatch(r"[0-9a-f]{16}", answer.headers["x-request-id"])
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "server" not in answer.headers
    answer = server.ask("GET", "/v1/model", headers={"x-request-id": "job-7"})
    assert answer.headers["x-request-id"] == "job-7"
    answer = server.ask("GET", "/v1/model", headers={"x-request-id": 'a"b'})
    assert answer.headers["x-request-id"] != 'a"b'


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": TOKEN},
        {"authorization": "Basic " + TOKEN},
        {"authorization": "Bearer"},
        {"authorization": "Bearer " + TOKEN[:-1]},
        {"authorization": "Bearer " + TOKEN + "0"},
        {"authorization": "Bearer \xff"},
    ],
)
def test_a_wrong_token(guarded, picture, headers):
    for method, path in (("GET", "/v1/model"), ("GET", "/metrics"), ("GET", "/openapi.json")):
        answer = guarded.ask(method, path, headers=headers)
        assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
    answer = guarded.ask("POST", "/v1/images", picture, headers)
    assert answer.status == 401 and not len(guarded.service.images)
    answer = guarded.ask("POST", "/v2/models/tap/infer", b"{}", headers)
    assert answer.status == 401 and answer.json().keys() == {"error"}


def test_the_right_token(guarded, picture):
    headers = {"authorization": "bearer  " + TOKEN}
    behind_a_proxy = {"host": "tap.example", "origin": "https://tap.example"}
    answer = guarded.ask("POST", "/v1/images", picture, headers | behind_a_proxy)
    assert answer.status == 201
    assert TOKEN not in repr(guarded.service.options)
    for path in ("/", "/v2/health/live", "/v2/health/ready"):
        assert guarded.ask("GET", path).status == 200


def test_pages_of_other_sites_are_refused(server, picture):
    for headers in (
        {"host": "evil.example"},  # whose name points to 127.0.0.1
        {"host": "["},
        {"origin": "http://["},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": f"http://localhost:{server.port + 1}"},
    ):
        answer = server.ask("POST", "/v1/images", picture, headers)
        assert answer.status == 403, headers
    own = {"host": f"localhost:{server.port}", "origin": f"http://localhost:{server.port}"}
    assert server.ask("POST", "/v1/images", picture, own).status == 201


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_answered_after_its_end(server, chunked):
    connection = server.connection()
    content = bytes(MIB + 1)
    body = iter([content[:1000], content[1000:]]) if chunked else content
    connection.request("POST", "/v1/images", body, encode_chunked=chunked)
    response = connection.getresponse()
    assert (
        response.status == 413 and f"at most {MIB} bytes" in json.loads(response.read())["detail"]
    )
    connection.request("GET", "/v1/model")  # the connection is still good
    assert connection.getresponse().status == 200
    connection.close()


def test_json_that_would_hold_up_the_others_is_refused(server):
    body = b'{"prompts": [{"sketch": [' + b"[1, 2]," * 150_000 + b"[1, 2]]}]}"
    answer = server.ask("POST", "/v1/images/x/regions", body, {"content-type": "application/json"})
    assert answer.status == 413 and "at most 1048576 bytes" in answer.detail


def test_no_answer_leads_elsewhere(server):
    for path in ("/v1/model/", "/v1/images/", "/page/", "//v1/model"):
        assert server.ask("GET", path).status in (404, 405), path


def test_compressed_bodies_are_refused(server):
    answer = server.ask("POST", "/v1/images", b"...", {"content-encoding": "gzip"})
    assert answer.status == 415


def test_a_full_queue(slow, picture):
    with served(lambda: slow, max_pending=2, workers=1) as server:
        threads, results = in_threads(2, lambda: server.ask("POST", "/v1/images", picture).status)
        assert slow.encoding.acquire(timeout=60)
        wait_until(lambda: pending(server) == 2)
        answer = server.ask("POST", "/v1/images", picture)
        assert answer.status == 429 and "2 requests are waiting" in answer.detail
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert server.ask("GET", "/v2/health/ready").status == 200  # still answers
        slow.go.set()
        for thread in threads:
            thread.join()
        assert results == [201, 201] and pending(server) == 0
        assert server.ask("POST", "/v1/images", picture).status == 201


def pending(server):
    text = server.ask("GET", "/metrics").body.decode()
    return float(re.search(r"^tap_pending (\S+)$", text, re.M)[1])


def wait_until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come about")


def test_a_deadline_of_the_server_and_of_the_client(slow, picture):
    with served(lambda: slow, timeout_s=0.3, workers=1) as server:
        answer = server.ask("POST", "/v1/images", picture)
        assert answer.status == 504 and "not done within 0.3 s" in answer.detail
        headers = {"x-request-timeout-ms": "50"}
        answer = server.ask("POST", "/v1/images", picture, headers)
        assert answer.status == 504 and "not done within 0.05 s" in answer.detail
        assert not server.service._queue._waiting  # nor its picture kept
        for text in ("0", "-1", "1.5", "soon"):
            answer = server.ask("POST", "/v1/images", picture, {"x-request-timeout-ms": text})
            assert answer.status == 422
        assert pending(server) == 0
        slow.go.set()
        wait_until(lambda: server.ask("POST", "/v1/images", picture).status == 201)
        # The first ran on for nobody, the second was never begun, and not kept either.
        encoded = 0
        while slow.encoding.acquire(blocking=False):
            encoded += 1
        assert encoded == 2


def test_a_stream_says_that_its_deadline_has_passed(micro_bundle, picture, monkeypatch):
    go = threading.Event()
    with served(lambda: TapPredictor.from_bundle(micro_bundle.path), timeout_s=0.5) as server:
        image_id = server.upload(picture)
        monkeypatch.setattr(
            server.service.predictor, "caption_many", lambda *_, **__: [go.wait(60)]
        )
        request = {"prompts": [{"points": [[9, 9, 1]]}], "stream": True}
        answer = server.ask("POST", f"/v1/images/{image_id}/regions", request)
        go.set()
    [(first, _), (last, problem)] = events_of(answer.body)
    assert (first, last) == ("regions", "error")
    assert problem["status"] == 504 and "not done in time" in problem["detail"]


def test_a_large_answer_keeps_its_place_until_it_is_taken(micro_bundle, picture):
    """It is in memory until then."""
    with served(lambda: TapPredictor.from_bundle(micro_bundle.path), max_pending=1) as server:
        image_id = server.upload(picture)
        prompts = [{"points": [[x, y, 1]]} for x in range(16) for y in range(16)]
        body = json.dumps({"prompts": prompts, "captions": False, "masks": "rle"}).encode()
        head = f"POST /v1/images/{image_id}/regions HTTP/1.1\r\nhost: localhost\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
            deaf.connect(("127.0.0.1", server.port))
            deaf.sendall(head.encode() + body)
            started = deaf.recv(1 << 10)
            assert started.startswith(b"HTTP/1.1 200 OK")
            length = int(re.search(rb"content-length: (\d+)", started)[1])
            assert length > 6 << 20, "too small to fill the buffers of both sockets"
            assert server.ask("POST", "/v1/images", picture).status == 429
        wait_until(lambda: server.ask("POST", "/v1/images", picture).status == 201)


def test_nobody_waits_for_the_work_of_a_client_that_is_gone(slow, picture):
    with served(lambda: slow, max_pending=1, workers=1) as server:
        connection = server.connection()
        connection.request("POST", "/v1/images", picture)
        assert slow.encoding.acquire(timeout=60)
        connection.close()
        wait_until(lambda: pending(server) == 0)
        slow.go.set()
        wait_until(lambda: server.ask("POST", "/v1/images", picture).status == 201)


def test_a_backend_that_fails(slow, picture, capfd):
    slow.go.set()
    with served(lambda: slow) as server:
        slow.error = SessionError("a secret of the backend")
        answer = server.ask("POST", "/v1/images", picture, {"x-request-id": "job-1"})
        words = "the log of the server has the details"
        assert answer.status == 500 and answer.detail == f"the backend failed; {words}"
        slow.error = RuntimeError("a secret of the code")
        answer = server.ask("POST", "/v1/images", picture, {"x-request-id": "job-2"})
        assert answer.status == 500 and answer.detail == f"internal error; {words}"
        slow.error = None
        assert server.ask("POST", "/v1/images", picture).status == 201
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    errors = [line for line in lines if line["level"] == "error"]
    assert [line["request_id"] for line in errors] == ["job-1", "job-2"]
    assert errors[0]["message"] == "a secret of the backend"
    assert "RuntimeError: a secret of the code" in errors[1]["error"]


def test_slow_heads_and_bodies_are_cut_off(micro_bundle, picture):
    head = b"POST /v1/images HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n"
    with served(lambda: TapPredictor.from_bundle(micro_bundle.path), body_timeout_s=0.5) as server:
        parts = (b"", head[:30], b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n" + head[:30])
        cut = [sent_in_part(server, part) for part in parts]
        half = sent_in_part(server, head + b"half")
        answers = [received(one) for one in cut]
        assert answers[:2] == [b"", b""] and answers[2].startswith(b"HTTP/1.1 200 OK")
        assert received(half).startswith(b"HTTP/1.1 408 Request Timeout")
        assert server.ask("POST", "/v1/images", picture).status == 201


def sent_in_part(server, content):
    client = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    client.sendall(content)
    return client


def received(client):
    """All that a server sends until it closes the connection."""
    parts = []
    with client:
        while part := client.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def test_at_the_limit_the_slowest_client_makes_room(micro_bundle, picture):
    head = b"POST /v1/images HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n"
    with (
        served(lambda: TapPredictor.from_bundle(micro_bundle.path), max_connections=3) as server,
        sent_in_part(server, b"GET /") as first,
        sent_in_part(server, head + b"half") as second,
        sent_in_part(server, b"") as third,
    ):
        assert server.ask("POST", "/v1/images", picture).status == 201
        assert is_cut_off(first)
        with sent_in_part(server, b""):
            assert server.ask("POST", "/v1/images", picture).status == 201
            assert is_cut_off(second)
        third.sendall(b"GET /v2/health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert third.recv(1 << 10).startswith(b"HTTP/1.1 200 OK")


def test_at_the_limit_requests_that_run_are_not_cut_off(slow, picture):
    with served(lambda: slow, max_connections=2) as server, contextlib.ExitStack() as held:
        threads, results = in_threads(1, lambda: server.ask("POST", "/v1/images", picture).status)
        assert slow.encoding.acquire(timeout=60)
        for _ in range(4):
            held.enter_context(sent_in_part(server, b"GET /"))
        slow.go.set()
        for thread in threads:
            thread.join()
        assert results == [201]


def is_cut_off(client):
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_what_was_accepted_is_finished_at_the_end(slow, picture):
    with served(lambda: slow) as server:
        threads, results = in_threads(1, lambda: server.ask("POST", "/v1/images", picture).status)
        assert slow.encoding.acquire(timeout=60)
        server.service.stop_serving()
        time.sleep(0.3)  # the listening socket is closed by then
        with pytest.raises(ConnectionRefusedError):
            server.ask("GET", "/v2/health/live")
        slow.go.set()
        for thread in threads:
            thread.join()
    assert results == [201]


def test_nothing_of_the_model_answers_before_it_is_loaded(micro_bundle, picture):
    go, asked = threading.Event(), {}

    def open_predictor():
        assert go.wait(60)
        return TapPredictor.from_bundle(micro_bundle.path)

    def ask_early(port):
        early = Served(f"http://127.0.0.1:{port}", None)
        for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/tap/ready", "/v1/model"):
            asked[path] = early.ask("GET", path)
        asked["upload"] = early.ask("POST", "/v1/images", picture)
        go.set()

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    thread = threading.Thread(
        target=lambda: (wait_until(lambda: can_connect(port)), ask_early(port))
    )
    thread.start()
    with served(open_predictor, port=port) as server:
        thread.join()
        assert asked.pop("/v2/health/live").status == 200
        for path, answer in asked.items():
            assert answer.status == 503 and answer.headers["retry-after"] == "2", path
        assert server.ask("GET", "/v2/health/ready").json() == {"ready": True}


def test_the_end_does_not_wait_for_a_model_that_is_being_loaded(micro_bundle):
    begun, steps = threading.Event(), []

    def open_predictor():
        begun.set()
        while True:
            time.sleep(0.01)
            steps.append(None)
            service.require_wanted()

    service = Service(open_predictor, MODEL, ServeOptions(port=0))
    ready = []
    thread = threading.Thread(target=lambda: serve(service, ready.append))
    thread.start()
    assert begun.wait(60)
    wait_until(lambda: len(steps) > 3)
    service.stop_serving()
    thread.join(60)
    assert not thread.is_alive() and service.error is None and not ready


def can_connect(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_a_bundle_that_fails_ends_the_server(micro_bundle):
    def open_predictor():
        raise SessionError("the self-test failed")

    with pytest.raises(SessionError, match="the self-test failed"), served(open_predictor):
        pass


def test_the_log_is_json_and_tells_no_names_of_pictures(micro_bundle, picture, capfd):
    with served(lambda: TapPredictor.from_bundle(micro_bundle.path)) as server:
        image_id = server.upload(picture)
        server.ask("GET", f"/v1/images/{image_id}?secret=1", headers={"x-request-id": "mine"})
        for _ in range(2):
            sent_in_part(server, b"nonsense\r\n\r\n").close()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    requests = [line for line in lines if line["message"] == "request"]
    assert [line["route"] for line in requests] == ["/v1/images", "/v1/images/{image_id}"]
    assert requests[1]["request_id"] == "mine" and requests[1]["status"] == 200
    assert image_id not in json.dumps(lines) and "secret" not in json.dumps(lines)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host": "0.0.0.0"}, "there is no token; pass --token-file FILE, or --without-token"),
        ({"host": "::"}, "there is no token"),
        ({"host": "example.org"}, "there is no token"),
        ({"token": "short"}, "expected at least 16 printable ASCII characters"),
        ({"token": "a token with spaces"}, "expected at least 16 printable"),
        ({"workers": 0}, "workers is 0"),
        ({"max_wait_ms": -1.0}, "max_wait_ms"),
        ({"timeout_s": float("inf")}, "timeout_s"),
    ],
)
def test_options_that_are_refused(options, words):
    with pytest.raises(InputError, match=re.escape(words)):
        ServeOptions(**options)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_no_token(host):
    assert ServeOptions(host=host).is_loopback
    assert not ServeOptions(host="0.0.0.0", token=TOKEN).is_loopback
    assert not ServeOptions(host="0.0.0.0", without_token=True).is_loopback
