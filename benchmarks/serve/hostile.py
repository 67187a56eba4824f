"""Attacks, while an honest client goes on."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from benchmarks.serve.attacks import Attack, AttackSucceeded
from benchmarks.serve.clients import (
    connected,
    keep_asking,
    latency,
    statuses,
    tally,
    until,
)
from benchmarks.serve.exam import Exam
from benchmarks.serve.overload import faults
from benchmarks.serve.target import SETTLE_S, Target
from tap_deploy.errors import TapError

QUIET_S = 5.0
REST_S = 0.5  # in which the connections of earlier clients end


async def under_attack(
    name: str, attack: Attack, target: Target, exam: Exam, *, quiet_seconds: float = QUIET_S
) -> dict[str, Any]:
    """Attack a server while a client sends pictures with prompts, one after another.

    Returns:
        Figures, and under ``failures`` what was wrong, a line each.
    """
    await asyncio.sleep(REST_S)
    before = target.state()
    async with connected(target, exam) as honest:
        ask = honest.one_shot
        quiet = await keep_asking(ask, exam.questions, 1, until(quiet_seconds))
        ended = asyncio.Event()
        going_on = asyncio.ensure_future(keep_asking(ask, exam.questions, 1, ended.is_set))
        figures, failures = dict[str, Any](), list[str]()
        try:
            figures = await attack(target, before)
        except (AttackSucceeded, TapError) as exc:
            failures.append(str(exc))
        finally:
            ended.set()
            replies = await going_on
        replies.append(await ask(exam.questions[0]))  # it still answers
    failures += faults([*quiet, *replies])
    try:
        await target.freed(before, SETTLE_S)
    except TapError as exc:
        failures.append(str(exc))
    return {
        "name": name,
        **figures,
        "quiet": latency(quiet),
        "latency": latency(replies),
        "statuses": statuses(replies),
        "differences": dataclasses.asdict(tally([*quiet, *replies])),
        "before": dataclasses.asdict(before),
        "after": dataclasses.asdict(target.state()),
        "failures": [f"{name}: {line}" for line in failures],
    }
