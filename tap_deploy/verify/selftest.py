"""Self-test of a bundle on the target machine, against its golden samples.

Bugs in drivers and engine builders can give wrong numbers without an error. The verdict is stored
where the graphs are loaded from: next to the plans for engines, in the manifest for backends that
load ONNX files. Loading refuses graphs that failed. An interrupted self-test counts as failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pathlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.json_record import record_to_json
from tap_deploy.bundle.marks import mark_variant, marks_of
from tap_deploy.bundle.plans import MARK_FILES, plan_digests, read_marks, record_selftest
from tap_deploy.bundle.precision_record import SelftestMark
from tap_deploy.errors import SessionError, VerificationError
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.gpu.pipeline import DevicePipeline
from tap_deploy.sessions.pipeline import Pipeline
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.timing import utc_now
from tap_deploy.verify.comparison import Comparison
from tap_deploy.verify.graph_check import (
    expected_of_pipeline,
    verify_sessions,
    within_limits,
)
from tap_deploy.verify.pipeline_check import Expected, check_pipeline
from tap_deploy.verify.recorder import ComparisonRecorder
from tap_deploy.verify.tolerances import tolerances_for

logger = logging.getLogger(__name__)

UNFINISHED = "the self-test did not complete"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelftestSubject:
    """The subject of a self-test, and the place of its verdict.

    Attributes:
        bundle: the opened bundle.
        run_on: backend, precision and device that run the graphs.
        backend_version: version of the backend's package.
        device: description of the machine and its GPU.
        plans: folder of the engine plans; None for a backend that loads the ONNX files.
        keeps_marks: whether the verdict is stored; several programs that start from one bundle
            would read each other's marks of unfinished self-tests.
    """

    bundle: Bundle
    run_on: RunOn
    backend_version: str
    device: str
    plans: pathlib.Path | None = None
    keeps_marks: bool = True

    def recorder(self, field: str = "selftest") -> Callable[[SelftestMark], None]:
        """Return a function that stores marks of the current graphs or plans.

        Args:
            field: a key of ``marks.MARKS``.

        Call this before loading them. Call the returned function first with the mark of an
        unfinished self-test, which remains if the self-test is interrupted. If the folder is not
        writable, or lies in the cache of the model hub, marks are dropped, after a warning. The
        returned function raises InputError if writing fails, and BundleError if the graphs or
        plans have been replaced, or another self-test of them failed meanwhile.
        """
        if not self.keeps_marks:
            return lambda mark: None
        folder = self.bundle.path if self.plans is None else self.plans
        address = self.bundle.hub_address
        if address is not None:
            logger.warning(
                "the verdict is not kept: %s is a copy in the model hub's cache; keep it in a copy "
                "of your own, made with: tap-export fetch %s -o DIR",
                address,
                address,
            )
            return lambda mark: None
        if not os.access(folder, os.W_OK):
            logger.warning("%s cannot be written: the verdict is not kept there", folder)
            return lambda mark: None
        tested = {} if self.plans is None else plan_digests(self.plans)
        own: SelftestMark | None = None

        def record(mark: SelftestMark) -> None:
            nonlocal own
            if self.plans is None:
                name, variant = self.run_on.mark_name, self.run_on.variant
                mark_variant(self.bundle, variant, name, mark, own=own, field=field)
            else:
                record_selftest(self.plans, mark, tested=tested, own=own, file=MARK_FILES[field])
            own = mark

        return record

    def unfinished_mark(self) -> SelftestMark:
        """Return the mark of a check that has not ended; a random number tells it from others."""
        run = secrets.token_hex(8)
        return SelftestMark(passed=False, device=self.device, error=UNFINISHED, run=run)


def earlier_mark(subject: SelftestSubject, field: str) -> SelftestMark | None:
    """Return the mark that is stored for a subject on its machine; None if there is none.

    Args:
        subject: what was tested.
        field: a key of ``marks.MARKS``.
    """
    if subject.plans is not None:
        marks = read_marks(subject.plans / MARK_FILES[field])
    else:
        run_on = subject.run_on
        marks = marks_of(subject.bundle, run_on.variant, run_on.mark_name, field)
    return marks.get(subject.device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelftestResult:
    """The result of a self-test of one backend and precision on one machine.

    Attributes:
        subject: what was tested.
        checks: all comparisons, in order.
        seconds: stage -> wall time including the comparisons, seconds.
        error: error that ended the self-test early, or None.
        finished_at: end of the self-test, UTC, ISO 8601.
    """

    subject: SelftestSubject
    checks: tuple[Comparison, ...]
    seconds: dict[str, float]
    error: str | None
    finished_at: str

    @property
    def passed(self) -> bool:
        """Whether the self-test completed with at least one comparison and no failure."""
        return self.error is None and bool(self.checks) and all(c.passed for c in self.checks)

    @property
    def mark(self) -> SelftestMark:
        """The mark that is kept with the graphs or plans."""
        return SelftestMark(
            passed=self.passed,
            backend=self.subject.run_on.mark_name,
            backend_version=self.subject.backend_version,
            precision=self.subject.run_on.precision,
            device=self.subject.device,
            finished_at=self.finished_at,
            seconds={stage: round(seconds, 4) for stage, seconds in self.seconds.items()},
            comparisons=len(self.checks),
            failed=tuple(str(check) for check in self.checks if not check.passed),
            error=self.error,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the mark as JSON types, with failed comparisons as lines of text."""
        return record_to_json(self.mark)

    def __str__(self) -> str:
        subject = self.subject
        stages = ", ".join(f"{stage} {s:.2f} s" for stage, s in self.seconds.items())
        failed = sum(not check.passed for check in self.checks)
        lines = [*map(str, self.checks), *([f"error: {self.error}"] if self.error else [])]
        lines.append(
            f"{'PASSED' if self.passed else 'FAILED'}: {len(self.checks)} comparisons, {failed} "
            f"failed, in {sum(self.seconds.values()):.1f} s ({stages})"
        )
        lines.append(
            f"{subject.run_on.mark_name} {subject.backend_version}, {subject.run_on.precision}, "
            f"{subject.device}"
        )
        return "\n".join(lines)

    def require(self) -> None:
        """Raise VerificationError unless the self-test passed."""
        if self.passed:
            return
        subject, run_on = self.subject, self.subject.run_on
        reason = self.error or next(
            (" ".join(str(check).split()) for check in self.checks if not check.passed),
            "nothing was compared",
        )
        marked = " and is marked as failed" if subject.keeps_marks else ""
        raise VerificationError(
            f"bundle {subject.bundle.path} fails its self-test with {run_on.mark_name} in "
            f"{run_on.precision} on this machine{marked}: {reason}; try another "
            "precision, see docs/jetson.md for known bugs, or load it with --allow-failed"
        )


def run_selftest(
    subject: SelftestSubject,
    load_sessions: Callable[[], Mapping[str, Session]],
    *,
    load_pipeline: Callable[[], Pipeline] | None = None,
    on_check: Callable[[Comparison], None] | None = None,
) -> SelftestResult:
    """Run the golden samples graph by graph and through a pipeline, and store the verdict.

    Args:
        subject: what is tested.
        load_sessions: loads one session per graph name regardless of an earlier verdict; they are
            closed here.
        load_pipeline: loads the graphs as a pipeline; called after the sessions are closed,
            because a board may not have memory for both. It is closed here. None to skip it.
        on_check: called with every comparison.

    Raises:
        BundleError: the bundle has no golden samples, no graphs or plans, or no int8 deviations to
            derive tolerances from; or the graphs or plans were replaced during the self-test, or
            another self-test failed meanwhile, whose verdict is kept.
        InputError: the bundle cannot be written, or the engines take fewer points than the
            samples have; no verdict is stored.
        SessionError: a graph does not load in a session; no verdict is stored.
        MissingDependencyError: the backend is not installed.
    """
    golden = subject.bundle.golden()
    precision_record = subject.bundle.manifest.precision_record(subject.run_on.variant)
    run_on = subject.run_on
    tolerances = tolerances_for(run_on.precision, precision_record, in_tensorrt=run_on.in_tensorrt)
    timed = _TimedComparisons(on_check)
    expected: Expected | None = None
    error = None
    record = subject.recorder()
    with _closed_at_the_end(load_sessions()) as sessions:
        # Raises before a verdict is stored: an engine that cannot be tested has not failed.
        golden = within_limits(sessions, golden)
        # A bad engine may crash the process; this mark then remains. The random number
        # distinguishes it from that of another self-test.
        record(subject.unfinished_mark())
        timed.restart()
        config = subject.bundle.config
        try:
            verify_sessions(
                sessions,
                config,
                [golden],
                backend=subject.run_on.mark_name,
                precision=subject.run_on.precision,
                tolerances=tolerances,
                on_check=timed.note,
            )
            if load_pipeline is not None:
                expected = expected_of_pipeline(sessions, config, golden.samples[0])
        except SessionError as exc:
            error = str(exc)
    if load_pipeline is not None and expected is not None:
        recorder = ComparisonRecorder(tolerances, timed.note)
        try:
            with contextlib.closing(load_pipeline()) as pipeline:
                timed.restart()
                check_pipeline(pipeline, golden.samples[0], expected, config.pad_id, recorder)
                if isinstance(pipeline, DevicePipeline):
                    pipeline.require_replay()
        except SessionError as exc:
            error = str(exc)
    result = SelftestResult(
        subject=subject,
        checks=tuple(timed.checks),
        seconds=timed.seconds,
        error=error,
        finished_at=utc_now(),
    )
    record(result.mark)
    return result


class _TimedComparisons:
    """Collects comparisons and the time they took, by stage."""

    def __init__(self, on_check: Callable[[Comparison], None] | None) -> None:
        self._on_check = on_check
        self.checks: list[Comparison] = []
        self.seconds: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Restart the clock, to exclude loading."""
        self._start = time.perf_counter()

    def note(self, check: Comparison) -> None:
        """Store a comparison and the time since the previous one."""
        elapsed = time.perf_counter() - self._start
        self.seconds[check.graph] = self.seconds.get(check.graph, 0.0) + elapsed
        self.checks.append(check)
        if self._on_check is not None:
            self._on_check(check)
        self.restart()


@contextlib.contextmanager
def _closed_at_the_end(sessions: Mapping[str, Session]) -> Iterator[Mapping[str, Session]]:
    try:
        yield sessions
    finally:
        for session in sessions.values():
            session.close()
