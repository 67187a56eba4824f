"""Runs each step in its own process, so that a step may raise, crash or hang."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu.context import Context, Notes, Skipped, one_line, read_json, write_json
from benchmarks.gpu.machine import library_path, missing
from benchmarks.gpu.steps import Step

PASSED, FAILED, SKIPPED, NO_TIME = "passed", "failed", "skipped", "no time"
TAIL_LINES = 30
SKIP_CODE = 77
GRACE_S = 2.0  # time for faulthandler to print the stacks of a hanging step
FOR_CHILDREN = {"PYTHONFAULTHANDLER": "1", "ORT_DISABLE_TELEMETRY": "1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """Result of a step.

    Attributes:
        step: name of the step.
        title: title of the step.
        status: ``PASSED``, ``FAILED``, ``SKIPPED`` or ``NO_TIME``.
        reason: why the step did not pass; empty if it passed.
        seconds: run time with the start of the process, seconds.
        uses_gpu: whether the step tests a GPU.
        notes: notes of the step; if it was killed, the notes up to then.
        log_tail: last lines of its output, if it failed.
    """

    step: str
    title: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    uses_gpu: bool = False
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    log_tail: tuple[str, ...] = ()


def run_steps(
    steps: Sequence[Step],
    context: Context,
    command: Sequence[str],
    *,
    budget_s: float | None = None,
    on_result: Callable[[StepResult], None],
    on_start: Callable[[Step, float], None] = lambda step, limit_s: None,
) -> None:
    """Run steps one after the other.

    Args:
        steps: the steps, in order.
        context: context of all steps.
        command: command that runs a step; its name and the context as JSON are appended.
        budget_s: seconds for all steps; None for the limits of the steps only.
        on_result: called with each result.
        on_start: called with a step and its limit in seconds before it starts.
    """
    start = time.monotonic()
    for step in steps:
        left = float("inf") if budget_s is None else budget_s - (time.monotonic() - start)
        reason = missing(step.needs)
        if reason is not None:
            on_result(_result(step, SKIPPED, reason))
        elif left < step.min_s:
            on_result(
                _result(step, NO_TIME, f"{max(left, 0):.0f} s left, {step.min_s:.0f} s needed")
            )
        else:
            on_start(step, min(step.limit_s, left))
            on_result(run_step(step, context, command, min(step.limit_s, left)))


def run_step(step: Step, context: Context, command: Sequence[str], limit_s: float) -> StepResult:
    """Run a step in its own process group, and kill the group at the end."""
    log, notes = context.logs / f"{step.name}.log", context.logs / f"{step.name}.json"
    notes.unlink(missing_ok=True)
    context = dataclasses.replace(context, deadline=time.time() + limit_s)
    environment = {**os.environ, **library_path(), **FOR_CHILDREN, **step.environment}
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, step.name, context.to_json()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = _wait(process, limit_s)
        finally:
            _kill(process)
    seconds = round(time.monotonic() - start, 1)
    status, reason = _judge(code, notes, limit_s)
    tail = _tail(log) if status == FAILED else ()
    return _result(step, status, reason, seconds, read_json(notes), tail)


def child(step: Step, context: Context) -> int:
    """Run a step in this process; return the exit code. The reason of a failure is noted."""
    notes = Notes(context.logs / f"{step.name}.json")
    try:
        step.call(context, notes)
    except Exception as exc:
        traceback.print_exc()
        notes.put("reason", one_line(exc))
        return SKIP_CODE if _is_missing(exc) else 1
    write_json(context.logs / f"{step.name}.json", notes.values)
    return 0


def _is_missing(error: Exception) -> bool:
    """Whether an error means a missing package: Skipped, or MissingDependencyError if loaded."""
    ours = getattr(sys.modules.get("tap_deploy.errors"), "MissingDependencyError", Skipped)
    return isinstance(error, (Skipped, ours))


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """Return the exit code; None after a timeout, once the step has printed its stacks."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        # faulthandler prints the stacks. Signal the parent first, or the lines would interleave.
        process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        _signal(process, signal.SIGABRT)
        time.sleep(GRACE_S / 4)
        return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    _signal(process, signal.SIGKILL)  # includes children that outlived it
    with contextlib.suppress(subprocess.TimeoutExpired):  # it may be stuck in the driver
        process.wait(10)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _judge(code: int | None, notes: pathlib.Path, limit_s: float) -> tuple[str, str]:
    reason = str(read_json(notes).get("reason", ""))
    if code == 0:
        return PASSED, ""
    if code == SKIP_CODE:
        return SKIPPED, reason or "skipped without a reason"
    if code is None:
        return FAILED, f"timed out after {limit_s:.0f} s and was killed"
    if code < 0:
        return FAILED, f"crashed with {signal.Signals(-code).name}"
    return FAILED, reason or f"ended with exit code {code}"


def _tail(log: pathlib.Path) -> tuple[str, ...]:
    lines = log.read_text("utf-8", errors="replace").splitlines()
    return tuple(line[:500] for line in lines[-TAIL_LINES:])


def _result(
    step: Step,
    status: str,
    reason: str = "",
    seconds: float = 0.0,
    notes: dict[str, Any] | None = None,
    log_tail: tuple[str, ...] = (),
) -> StepResult:
    return StepResult(
        step=step.name,
        title=step.title,
        status=status,
        reason=reason,
        seconds=seconds,
        uses_gpu=step.uses_gpu,
        notes=notes or {},
        log_tail=log_tail,
    )


def this_command() -> list[str]:
    """Return the command that runs a step, with the interpreter and program of this process."""
    return [sys.executable, "-X", "faulthandler", sys.argv[0], "--child"]
