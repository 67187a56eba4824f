"""Clients that ask one server, in one event loop."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import aiohttp

from benchmarks.serve.exam import Exam, Question, Tally
from benchmarks.serve.target import Target
from tap_deploy.errors import TapError
from tap_deploy.timing import Latency

PATIENCE_S = 180
# The server has a limit, 512 by default, above which it answers 503: the queue is to be tested.
CONNECTIONS = 256
ANSWERED = 200


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Reply:
    """The answer to a question.

    Attributes:
        question: what was asked.
        status: HTTP status; 0 if the connection broke.
        seconds: from the request, once there is a connection for it, to the end of the answer.
        retry_after: the header; None without it.
        region: of the answer; None unless the status is 200.
    """

    question: Question
    status: int
    seconds: float
    retry_after: str | None = None
    region: dict[str, Any] | None = None


Ask = Callable[[Question], Awaitable[Reply]]


class Clients:
    """Clients with a common pool of connections; a request may have to wait for one.

    Args:
        session: the connections.
        exam: the pictures.
    """

    def __init__(self, session: aiohttp.ClientSession, exam: Exam) -> None:
        self._session, self._exam = session, exam
        self._room = asyncio.Semaphore(CONNECTIONS)
        self._ids: list[str] = []

    async def upload_all(self) -> None:
        """Upload the pictures, for ``click`` and ``masks``."""
        self._ids = [await self.upload(picture) for picture in self._exam.pictures]

    async def upload(self, picture: bytes) -> str:
        """Upload a picture, and return its id.

        Raises:
            TapError: the server has refused it.
        """
        async with self._session.post("/v1/images", data=picture) as response:
            if response.status != 201:
                raise TapError(f"an upload was answered with {response.status}")
            return str((await response.json())["image_id"])

    async def is_kept(self, image_id: str) -> bool:
        """Ask whether the server still has a picture."""
        async with self._session.get(f"/v1/images/{image_id}") as response:
            return response.status == 200

    async def click(self, question: Question) -> Reply:
        """Ask for mask, name and caption on an uploaded picture."""
        return await self.ask_about(self._ids[question.picture], question)

    async def masks(self, question: Question) -> Reply:
        """Ask for mask and name on an uploaded picture."""
        return await self.ask_about(self._ids[question.picture], question, captions=False)

    async def ask_about(self, image_id: str, question: Question, *, captions: bool = True) -> Reply:
        """Ask about any uploaded picture."""
        path, body = f"/v1/images/{image_id}/regions", question.body(captions=captions)
        return await self._post(path, question, json=body)

    async def one_shot(self, question: Question) -> Reply:
        """Send the picture along."""
        form = aiohttp.FormData()
        form.add_field("image", self._exam.pictures[question.picture], filename="picture.png")
        form.add_field("request", json.dumps(question.body(captions=True)))
        return await self._post("/v1/regions", question, data=form)

    async def _post(self, path: str, question: Question, **content: Any) -> Reply:
        async with self._room:
            return await self._sent(path, question, content)

    async def _sent(self, path: str, question: Question, content: dict[str, Any]) -> Reply:
        start = time.perf_counter()
        try:
            async with self._session.post(path, **content) as response:
                received = await response.read()
                answered = response.status == ANSWERED
                return Reply(
                    question=question,
                    status=response.status,
                    seconds=time.perf_counter() - start,  # to the last byte, not parsed yet
                    retry_after=response.headers.get("retry-after"),
                    region=json.loads(received)["regions"][0] if answered else None,
                )
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
            return Reply(question=question, status=0, seconds=time.perf_counter() - start)


@contextlib.asynccontextmanager
async def connected(target: Target, exam: Exam) -> AsyncIterator[Clients]:
    """Yield clients of a server."""
    async with aiohttp.ClientSession(
        target.address,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=PATIENCE_S),
    ) as session:
        yield Clients(session, exam)


async def keep_asking(
    ask: Ask, questions: Sequence[Question], clients: int, enough: Callable[[], bool]
) -> list[Reply]:
    """Ask in a closed loop: each client asks again as soon as it has an answer.

    Args:
        ask: a method of ``Clients``.
        questions: in turn; each client begins at another one.
        clients: clients that ask at the same time.
        enough: whether to ask no more.
    """
    replies: list[Reply] = []

    async def client(turn: int) -> None:
        while not enough():
            replies.append(await ask(questions[turn % len(questions)]))
            turn += 1

    starts = (index * len(questions) // clients for index in range(clients))
    await asyncio.gather(*map(client, starts))
    return replies


def until(seconds: float) -> Callable[[], bool]:
    """Return whether a time from now has passed."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def statuses(replies: Sequence[Reply]) -> dict[str, int]:
    """Return how many replies have each status."""
    return dict(sorted(collections.Counter(str(reply.status) for reply in replies).items()))


def latency(replies: Sequence[Reply]) -> dict[str, float] | None:
    """Return the distribution of the latency of answered questions, ms; None if there are none."""
    seconds = [reply.seconds for reply in replies if reply.status == ANSWERED]
    return dataclasses.asdict(Latency.from_seconds(seconds)) if seconds else None


def tally(replies: Sequence[Reply]) -> Tally:
    """Compare all answers with those of the predictor."""
    found = Tally()
    for reply in replies:
        if reply.region is not None:
            found.add(reply.question, reply.region)
    return found
