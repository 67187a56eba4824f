"""Throughput at some numbers of clients, in turns with the predictor without a server."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.serve.clients import (
    Clients,
    Reply,
    connected,
    keep_asking,
    latency,
    statuses,
    tally,
    until,
)
from benchmarks.serve.exam import Exam, Question
from benchmarks.serve.target import Target
from tap_deploy.predictor import TapPredictor
from tap_deploy.server.batches import CAPTION, DECODE, ENCODE
from tap_deploy.timing import Ratio

CLICK, MASKS, ONE_SHOT = WORKS = ("click", "masks", "one shot")
CLIENTS = (1, 4, 16, 64)

Tell = Callable[[str], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turns:
    """How often and how long to measure.

    Attributes:
        turns: measurements of each row.
        seconds: duration of each, seconds.
        clients: numbers of clients.
    """

    turns: int = 5
    seconds: float = 3.0
    clients: tuple[int, ...] = CLIENTS


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """One measurement.

    Attributes:
        replies: all answers.
        seconds: until the last of them.
        regions: stage -> mean number of regions that shared a graph call.
    """

    replies: list[Reply]
    seconds: float
    regions: Mapping[str, float]

    @property
    def seconds_each(self) -> float:
        """Time per answered request, seconds."""
        return self.seconds / max(1, sum(reply.status == 200 for reply in self.replies))


def throughput(
    targets: Mapping[str, Target], predictor: TapPredictor, exam: Exam, turns: Turns, tell: Tell
) -> Iterator[dict[str, Any]]:
    """Yield a row for each kind of work, number of clients and server.

    Args:
        targets: servers by name.
        predictor: the same bundle in this process, called by one thread, one region a call.
        exam: clicks.
        turns: how long to measure.
        tell: called with what is measured next.
    """
    for work in WORKS:
        direct: list[float] = []
        found: dict[tuple[int, str], list[Turn]] = {
            (clients, name): [] for clients in turns.clients for name in targets
        }
        for turn in range(turns.turns):
            tell(f"{work}, turn {turn + 1}")
            direct += [_seconds_each(predictor, exam, work, turns.seconds)]
            for (clients, name), measured in found.items():
                one = _turn(targets[name], exam, work, clients, turns.seconds)
                measured.append(asyncio.run(one))
        for (clients, name), measured in found.items():
            yield {"work": work, "server": name, "clients": clients, **_row(measured, direct)}


def _row(turns: list[Turn], direct: list[float]) -> dict[str, Any]:
    replies = [reply for turn in turns for reply in turn.replies]
    rates = [1 / turn.seconds_each for turn in turns]
    return {
        "statuses": statuses(replies),
        "latency": latency(replies),
        "requests_per_s": statistics.median(rates),
        "requests_per_s_of_turns": rates,
        "direct_per_s_of_turns": [1 / seconds for seconds in direct],
        # How many times as many requests as calls of the predictor, in neighbouring turns.
        "ratio": dataclasses.asdict(Ratio.of(direct, [turn.seconds_each for turn in turns])),
        "regions_per_call": {
            stage: statistics.mean(turn.regions[stage] for turn in turns)
            for stage in turns[0].regions
        },
        "differences": dataclasses.asdict(tally(replies)),
    }


async def _turn(target: Target, exam: Exam, work: str, clients: int, seconds: float) -> Turn:
    async with connected(target, exam) as pool:
        await pool.upload_all()
        ask = {CLICK: pool.click, MASKS: pool.masks, ONE_SHOT: pool.one_shot}[work]
        await _warm_up(pool, exam, clients)
        before, start = target.counters(), time.monotonic()
        replies = await keep_asking(ask, exam.questions, clients, until(seconds))
        spent, after = time.monotonic() - start, target.counters()
    return Turn(replies=replies, seconds=spent, regions=_regions_per_call(before, after))


async def _warm_up(pool: Clients, exam: Exam, clients: int) -> None:
    await keep_asking(pool.click, exam.questions, clients, until(0.2))


def _regions_per_call(
    before: Mapping[tuple[str, str], float], after: Mapping[tuple[str, str], float]
) -> dict[str, float]:
    """Return the mean number of regions of a graph call, for the stages that have run."""

    def grown(kind: str, stage: str) -> float:
        name = f"tap_batch_regions_{kind}", stage
        return after.get(name, 0.0) - before.get(name, 0.0)

    stages = [stage for stage in (ENCODE, DECODE, CAPTION) if grown("count", stage)]
    return {stage: grown("sum", stage) / grown("count", stage) for stage in stages}


def _seconds_each(predictor: TapPredictor, exam: Exam, work: str, seconds: float) -> float:
    """Return the time of a call of the predictor for the same work, seconds."""
    calls, start, enough = 0, time.monotonic(), until(seconds)
    while not enough():
        _call(predictor, exam, exam.questions[calls % len(exam.questions)], work)
        calls += 1
    return (time.monotonic() - start) / calls


def _call(predictor: TapPredictor, exam: Exam, question: Question, work: str) -> object:
    source = exam.pictures if work == ONE_SHOT else exam.encoded
    return predictor.predict(
        source[question.picture], prompts=question.prompts, masks="rle", captions=work != MASKS
    )
