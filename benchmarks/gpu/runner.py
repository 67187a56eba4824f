"""One step in a process of its own: it may raise, crash or hang, and the next one goes on."""

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
GRACE_S = 2.0  # to write down where it hangs
FOR_CHILDREN = {"PYTHONFAULTHANDLER": "1", "ORT_DISABLE_TELEMETRY": "1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """How a step ended.

    Attributes:
        step: its name.
        title: what it answers.
        status: one of the constants of this module.
        reason: why it did not pass; empty if it did.
        seconds: how long it took, its start included.
        uses_gpu: whether it shows something about a GPU.
        notes: what it found; of a killed step what it had until then.
        log_tail: the end of what it printed, if it failed.
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
        steps: in order.
        context: for all of them.
        command: runs a step; its name and the context as JSON are added.
        budget_s: seconds for all of them; None for their own limits only.
        on_result: called with each result at once.
        on_start: called with a step and its limit before it begins.
    """
    start = time.monotonic()
    for step in steps:
        left = float("inf") if budget_s is None else budget_s - (time.monotonic() - start)
        reason = missing(step.needs)
        if reason is not None:
            on_result(_result(step, SKIPPED, reason))
        elif left < step.min_s:
            on_result(
                _result(step, NO_TIME, f"{max(left, 0):.0f} s are left, it needs {step.min_s:.0f}")
            )
        else:
            on_start(step, min(step.limit_s, left))
            on_result(run_step(step, context, command, min(step.limit_s, left)))


def run_step(step: Step, context: Context, command: Sequence[str], limit_s: float) -> StepResult:
    """Run a step in a process group of its own, and end the whole group when it is over."""
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
    """Do a step in this process; return its exit code. Why it did not pass goes to its notes."""
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
    """Whether something is not installed; ours says so, too, if ours was loaded at all."""
    ours = getattr(sys.modules.get("tap_deploy.errors"), "MissingDependencyError", Skipped)
    return isinstance(error, (Skipped, ours))


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """Return the exit code; None if the time is over, after it wrote where it was."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        # faulthandler prints the stacks; one process after the other, or their lines would mix.
        process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        _signal(process, signal.SIGABRT)
        time.sleep(GRACE_S / 4)
        return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    _signal(process, signal.SIGKILL)  # also children that outlived it
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for good
        process.wait(10)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _judge(code: int | None, notes: pathlib.Path, limit_s: float) -> tuple[str, str]:
    reason = str(read_json(notes).get("reason", ""))
    if code == 0:
        return PASSED, ""
    if code == SKIP_CODE:
        return SKIPPED, reason or "it skipped itself"
    if code is None:
        return FAILED, f"it was not done after {limit_s:.0f} s and was killed"
    if code < 0:
        return FAILED, f"it crashed with {signal.Signals(-code).name}"
    return FAILED, reason or f"it ended with exit code {code}"


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
    """Return what runs a step as the process that runs here was run."""
    return [sys.executable, "-X", "faulthandler", sys.argv[0], "--child"]
