"""The load test of the server, small: overload, attacks, uploads; times are not tested."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import sys
from collections.abc import Iterator

import pytest

for package in ("aiohttp", "fastapi"):
    pytest.importorskip(package)

from benchmarks.serve.__main__ import failures_of
from benchmarks.serve.attacks import (
    AttackSucceeded,
    deaf_clients,
    half_bodies,
    regions_request,
    slow_heads,
)
from benchmarks.serve.clients import Reply, connected, keep_asking, statuses, until
from benchmarks.serve.exam import Exam, Tally
from benchmarks.serve.hostile import under_attack
from benchmarks.serve.memory import Growth
from benchmarks.serve.overload import Load, faults, overload
from benchmarks.serve.tables import attack_table, overload_table, throughput_table
from benchmarks.serve.target import ProcessState, Target, started
from benchmarks.serve.throughput import WORKS, Turns, throughput
from benchmarks.serve.uploads import many_uploads
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.errors import TapError
from tap_deploy.predictor import TapPredictor
from tap_deploy.server.options import ServeOptions
from tap_deploy.server.running import _listening

QUEUE, KEPT = 8, 4
BODY_TIMEOUT_S, TIMEOUT_S = 1.0, 5.0
# ``tap-export serve`` gives slow clients 20 seconds, too long for a test.
PROGRAM = f"""
import sys
from tap_deploy.predictor import TapPredictor
from tap_deploy.server.images import embedding_bytes
from tap_deploy.server.options import ServeOptions
from tap_deploy.server.running import serve
from tap_deploy.server.service import ServedModel, Service

predictor = TapPredictor.from_bundle(sys.argv[1])
options = ServeOptions(
    port=0, max_pending={QUEUE}, body_timeout_s={BODY_TIMEOUT_S}, timeout_s={TIMEOUT_S},
    cache_bytes={KEPT} * embedding_bytes(predictor.config),
)
model = ServedModel(name="tap_demo", backend="onnxruntime", precision="fp32")
serve(
    Service(lambda: predictor, model, options),
    lambda address: print("serving on", address, flush=True),
)
"""


@pytest.fixture(scope="module")
def predictor(demo_bundle: Bundle) -> Iterator[TapPredictor]:
    with TapPredictor.from_bundle(demo_bundle.path) as predictor:
        yield predictor


@pytest.fixture(scope="module")
def exam(predictor: TapPredictor) -> Exam:
    return Exam.of(predictor, pictures=2)


@pytest.fixture(scope="module")
def target(demo_bundle: Bundle) -> Iterator[Target]:
    with started([sys.executable, "-c", PROGRAM, str(demo_bundle.path)]) as target:
        yield target


def attacked(attack, target, exam):
    figures = asyncio.run(under_attack("attack", attack, target, exam, quiet_seconds=0.2))
    assert figures["failures"] == []
    assert figures["differences"]["answers"] > 0
    assert attack_table([figures]).count("\n") == 2
    return figures


def test_more_than_the_server_can_do(target, exam):
    figures = asyncio.run(overload(target, exam, Load(clients=3, probe_seconds=1, seconds=1.5)))
    assert figures["failures"] == []
    assert set(figures["statuses"]) == {"200", "429"}
    assert "429" in overload_table(figures)


def test_as_many_clients_as_the_queue_takes_are_never_refused(target, exam):
    async def ask() -> list[Reply]:
        async with connected(target, exam) as clients:
            await clients.upload_all()
            return await keep_asking(clients.masks, exam.questions, QUEUE, until(1.5))

    replies = asyncio.run(ask())
    assert len(replies) > 3 * QUEUE
    assert set(statuses(replies)) == {"200"}


def test_heads_a_byte_a_second(target, exam):
    figures = attacked(slow_heads(20, BODY_TIMEOUT_S), target, exam)
    assert figures["longest_s"] >= BODY_TIMEOUT_S


def test_half_bodies(target, exam):
    figures = attacked(half_bodies(10, 10, BODY_TIMEOUT_S), target, exam)
    assert figures["ends"] == {"408": 10}


def test_answers_that_nobody_reads(target, exam):
    async def large_request() -> bytes:
        async with connected(target, exam) as client:
            image_id = await client.upload(exam.pictures[0])
        return regions_request(image_id, [{"box": [0, 0, 255, 255]}] * 8)

    request = asyncio.run(large_request())
    figures = attacked(deaf_clients(4, 1, request, TIMEOUT_S), target, exam)
    assert figures["held_files"] >= 5
    assert figures["freed_after_s"] > 0


def test_uploads_without_end(target, exam):
    figures = attacked(many_uploads(exam, 30, KEPT), target, exam)
    assert figures["kept"] == KEPT


def test_throughput_next_to_the_predictor(target, exam, predictor):
    turns = Turns(turns=1, seconds=0.3, clients=(1, 2))
    rows = list(throughput({"here": target}, predictor, exam.clicks(), turns, lambda what: None))
    assert [(row["work"], row["clients"]) for row in rows] == [
        (w, n) for w in WORKS for n in (1, 2)
    ]
    for row in rows:
        assert set(row["statuses"]) == {"200"}
        assert Tally(**row["differences"]).wrong == 0
        assert row["regions_per_call"]["decode"] >= 1
        assert ("caption" in row["regions_per_call"]) == (row["work"] != "masks")
    assert throughput_table(rows).count("\n") == 1 + len(rows)


def test_every_difference_is_counted(exam):
    question = exam.questions[0]
    right = question.expected
    size = right["segmentation"]["size"]
    found = Tally()
    found.add(question, right)
    assert found == Tally(answers=1)
    whole = {"size": size, "counts": [0, size[0] * size[1]]}
    found.add(question, right | {"segmentation": whole})
    assert (found.masks, found.pixels) == (1, size[0] * size[1] - right["area"])
    found.add(question, right | {"caption": "something else"})
    found.add(question, right | {"concepts": [{"name": "something else", "probability": 1.0}]})
    assert (found.answers, found.captions, found.names, found.wrong) == (4, 1, 1, 3)


def test_faults_of_replies(exam):
    question = exam.questions[0]
    good = Reply(question=question, status=200, seconds=0.1, region=question.expected)
    busy = Reply(question=question, status=429, seconds=0.1, retry_after="2")
    assert list(faults([good, busy])) == []
    wrong = dataclasses.replace(good, region=question.expected | {"caption": "something else"})
    assert "differ" in next(faults([good, wrong]))
    assert "answered with 500" in next(faults([good, dataclasses.replace(busy, status=500)]))
    assert list(faults([busy])) == ["no request was answered"]
    for retry_after in (None, "0", "61", "soon"):
        bad = dataclasses.replace(busy, retry_after=retry_after)
        assert "Retry-After" in next(faults([good, bad]))


def test_failures_of_a_report():
    row = {"work": "click", "clients": 4, "statuses": {"200": 5}}
    row["differences"] = dataclasses.asdict(Tally(answers=5))
    parts = {"overload": {"failures": []}, "hostile": [{"failures": []}]}
    assert list(failures_of({"throughput": [row], **parts})) == []
    refused = row | {"statuses": {"200": 5, "429": 1}}
    other = row | {"differences": dataclasses.asdict(Tally(answers=5, names=1))}
    parts = {"overload": {"failures": ["a"]}, "hostile": [{"failures": ["b"]}]}
    lines = list(failures_of({"throughput": [refused, other], **parts}))
    assert "answered with {'429': 1}" in lines[0] and "names=1" in lines[1]
    assert lines[2:] == ["a", "b"]


def test_growing_memory_is_not_flat():
    growth = Growth(first_bytes=100, last_bytes=109, most_bytes=111, slope_bytes_per_minute=1)
    assert growth.is_flat
    assert not dataclasses.replace(growth, last_bytes=111).is_flat


def test_an_attack_that_succeeds_is_a_failure(target, exam):
    async def attack(target, before):
        raise AttackSucceeded("the server is down")

    figures = asyncio.run(under_attack("attack", attack, target, exam, quiet_seconds=0.1))
    assert figures["failures"] == ["attack: the server is down"]


def test_what_is_not_freed_is_a_failure(target):
    nothing = ProcessState(resident_bytes=0, files=0, threads=0)
    with pytest.raises(TapError, match="the server holds"):
        asyncio.run(target.freed(nothing, 0))


def test_a_server_that_does_not_start():
    program = "import sys; sys.exit('error: no bundle')"
    with (
        pytest.raises(TapError, match="did not start: error: no bundle"),
        started([sys.executable, "-c", program]),
    ):
        pass


def test_the_body_of_an_answer_does_not_wait_until_its_head_is_acknowledged():
    with (
        _listening(ServeOptions(port=0)) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
