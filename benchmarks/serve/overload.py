"""More requests than the server can answer: memory, refusals, and every answer it gives."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.serve.clients import (
    ANSWERED,
    Ask,
    Reply,
    connected,
    keep_asking,
    latency,
    statuses,
    tally,
    until,
)
from benchmarks.serve.exam import Exam, Question
from benchmarks.serve.memory import watched
from benchmarks.serve.target import Target

FACTOR = 3
REFUSED = 429
LONGEST_RETRY_S = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """How to overload a server.

    Attributes:
        clients: clients of the closed loop that finds what the server can do.
        probe_seconds: its duration, seconds.
        seconds: duration of the overload, seconds.
        factor: offered over what the server can do.
    """

    clients: int = 32
    probe_seconds: float = 10.0
    seconds: float = 60.0
    factor: float = FACTOR


async def overload(target: Target, exam: Exam, load: Load) -> dict[str, Any]:
    """Offer requests at a fixed rate, whether or not earlier ones are answered.

    Returns:
        Figures, and under ``failures`` what was wrong, a line each.
    """
    async with connected(target, exam) as pool:
        await pool.upload_all()
        probe = await keep_asking(
            pool.click, exam.questions, load.clients, until(load.probe_seconds)
        )
        possible = sum(reply.status == ANSWERED for reply in probe) / load.probe_seconds
        rate = load.factor * possible
        start = time.monotonic()
        async with watched(target) as memory:
            replies = await _offer(pool.click, exam.questions, rate, load.seconds)
        spent = time.monotonic() - start
        afterwards = await pool.click(exam.questions[0])
    growth = memory.growth()
    retries = [reply.retry_after for reply in replies if reply.status == REFUSED]
    figures = {
        "possible_per_s": possible,
        "offered_per_s": rate,
        "sent_per_s": len(replies) / spent,  # less if both processes together cannot keep up
        "answered_per_s": sum(reply.status == ANSWERED for reply in replies) / spent,
        "seconds": spent,
        "statuses": statuses(replies),
        "retry_after_s": {text: retries.count(text) for text in sorted(set(map(str, retries)))},
        "latency": latency(replies),
        "memory": growth.to_dict(),
        "differences": dataclasses.asdict(tally([*probe, *replies])),
    }
    failures = list(faults([*probe, *replies]))
    if not retries:
        failures.append("no request was refused with 429")
    if not growth.is_flat:
        failures.append(f"memory has grown by {100 * growth.share:.1f} %")
    if afterwards.status != ANSWERED:
        failures.append(f"after the overload a click was answered with {afterwards.status}")
    return figures | {"failures": failures}


def faults(replies: Sequence[Reply]) -> Iterator[str]:
    """Yield what is wrong with replies under load: answers, statuses, Retry-After."""
    differences = tally(replies)
    if differences.wrong:
        yield f"answers differ from those of the predictor: {differences}"
    if not differences.answers:
        yield "no request was answered"
    for status, count in statuses(replies).items():
        if int(status) not in (ANSWERED, REFUSED):
            yield f"{count} requests were answered with {status}; expected 200 or 429"
    for reply in replies:
        if reply.status == REFUSED and not _is_sane(reply.retry_after):
            yield f"Retry-After of a 429 is {reply.retry_after!r}; expected 1 to {LONGEST_RETRY_S}"
            return


def _is_sane(retry_after: str | None) -> bool:
    text = retry_after or ""
    return text.isdecimal() and 1 <= int(text) <= LONGEST_RETRY_S


async def _offer(
    ask: Ask, questions: Sequence[Question], rate: float, seconds: float
) -> list[Reply]:
    """Send requests at a rate, and return all replies."""
    start, asked = time.monotonic(), []
    for turn in range(max(1, round(rate * seconds))):
        await asyncio.sleep(max(0.0, start + turn / rate - time.monotonic()))
        asked.append(asyncio.ensure_future(ask(questions[turn % len(questions)])))
    return await asyncio.gather(*asked)
