"""``tap-export verify``: compares a bundle with its reference, from tensors to captions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
import numpy as np

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.golden import Golden
from tap_deploy.bundle.precision_record import SelftestMark
from tap_deploy.cli.selftest import selftest_subject
from tap_deploy.cli.verify_bisect import bisect_failed_graph, require_bisectable
from tap_deploy.cli.verify_options import SUITES, VerifyOptions, verify_options
from tap_deploy.console.options import FILE, bundle_argument, json_option, selftest_runtime_options
from tap_deploy.console.progress import stage_bar
from tap_deploy.errors import SessionError
from tap_deploy.optional_modules import require_module
from tap_deploy.precisions import FP16, FP32
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.opening import sessions_from_bundle
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.storage.files import atomic_file
from tap_deploy.timing import utc_now
from tap_deploy.tokenizer import Tokenizer
from tap_deploy.verify.answers import FP32_FLOORS, AnswerFloors, AnswerTally
from tap_deploy.verify.comparison import Comparison, Report
from tap_deploy.verify.graph_check import number_of_checks, verify_sessions
from tap_deploy.verify.selftest import SelftestSubject, earlier_mark
from tap_deploy.verify.suite import run_suite
from tap_deploy.verify.summary import answers_summary
from tap_deploy.verify.tolerances import (
    CAPTION_IDS,
    FP16_TOLERANCES,
    Tolerance,
    Tolerances,
    tolerances_for,
)
from tap_deploy.verify.verification import Verification

logger = logging.getLogger(__name__)


@click.command("verify")
@bundle_argument
@selftest_runtime_options
@verify_options
@click.option("--report", type=FILE, metavar="FILE", help="Also write an HTML page with pictures.")
@json_option
def verify_command(
    bundle: str, run_on: RunOn, options: VerifyOptions, report: pathlib.Path | None, as_json: bool
) -> None:
    """Compare BUNDLE with its reference: tensors, masks, names and captions.

    Every graph gets the reference's own inputs, then the outputs of the graph before it, so that
    the result shows where error enters and how it grows. If anything leaves its tolerance, exits
    with 1, and run and TapPredictor refuse these graphs until they pass. A pass is kept for this
    machine. Needs no torch, unless PyTorch is the reference.

    onnxruntime's CPU provider computes fp16 graphs in fp32, which hides overflow, so every
    intermediate value is rounded to fp16; that needs "tap-deploy[quantize]".
    """
    if report is not None:
        require_module("jinja2", "an HTML report", "report")
    opened = Bundle.open(bundle)
    found = verification(opened, run_on, options)
    if report is not None:
        from tap_deploy.cli.verify_page import page_from_verification

        with atomic_file(report) as partial:
            page = page_from_verification(opened, found)
            partial.write_text(page, "utf-8", "backslashreplace")  # names that are not UTF-8
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else str(found))
    found.require(f"bundle {bundle} differs from the reference; do not use it")


def verification(bundle: Bundle, run_on: RunOn, options: VerifyOptions) -> Verification:
    """Compare a bundle with a reference, and keep the result in the bundle.

    It is not kept if the user chose tolerances, or weights that are not those of the bundle.

    Args:
        bundle: an opened bundle.
        run_on: backend, precision and device that run the graphs.
        options: what to compare with.

    Raises:
        BundleError: the bundle lacks the precision or plan, or golden samples.
        InputError: an option is invalid, or a picture cannot be read.
        SessionError: a graph does not load or run.
        MissingDependencyError: a package is not installed.
    """
    record = bundle.manifest.precision_record(run_on.variant)
    bundle.variant(run_on.variant)  # reports a missing precision first
    tolerances = options.tolerances(
        tolerances_for(run_on.precision, record, in_tensorrt=run_on.in_tensorrt)
    )
    options.require_reference(run_on)
    if options.bisect:
        require_bisectable(run_on, options)
    subject = selftest_subject(bundle, run_on)
    keep = _Mark(subject, kept=not options.own_tolerances and options.is_of_bundle(bundle))
    goldens = options.goldens(bundle, run_on.threads)
    floors = _floors(run_on.precision, options)
    tally = AnswerTally(
        bundle.vocabulary(),
        _near_tie(run_on.precision, tolerances),
        only_pictures=floors is not None and not floors.near_ties,
    )
    checks = number_of_checks(goldens)
    reference = None
    if options.suite is not None:
        checks += SUITES[options.suite].most_checks
        reference = options.reference_sessions(bundle, run_on)
    with (
        stage_bar("verify", checks) as stage,
        _open_sessions(bundle, run_on) as sessions,
        keep.while_running(),
    ):
        report = verify_sessions(
            sessions,
            bundle.config,
            goldens,
            backend=run_on.backend,
            precision=run_on.precision,
            tolerances=tolerances,
            tally=tally,
            on_check=lambda check: stage(check.tensor),
        )
        if options.suite is not None:
            report = report + run_suite(
                sessions,
                bundle.config,
                bundle.golden(),
                sizes=SUITES[options.suite],
                backend=run_on.backend,
                precision=run_on.precision,
                tolerances=tolerances,
                reference=reference,
                on_check=lambda check: stage(f"{check.tensor} {check.sample}"),
            )
    bisection = None
    if options.bisect:
        bisection = bisect_failed_graph(bundle, run_on, options, report, goldens[0])
    found = Verification(
        report=report,
        answers=answers_summary(tally, floors, _token_text(bundle.tokenizer())),
        failures=() if floors is None else tuple(tally.failures(floors)),
        worst=tuple(tally.worst),
        bisection=bisection,
        conditions=_conditions(subject, options),
    )
    keep.result(found)
    return found


def verify_bundle(
    bundle: Bundle,
    run_on: RunOn,
    goldens: Sequence[Golden],
    *,
    on_check: Callable[[Comparison], None] | None = None,
) -> Report:
    """Load the graphs of a bundle and compare their outputs with samples.

    On a CPU, every fp16 value is rounded to fp16, because onnxruntime alone computes in fp32; see
    ``tap_deploy.engines.fp16.rounding``.

    Args:
        bundle: an opened bundle.
        run_on: backend, precision and device that run the graphs.
        goldens: inputs and expected outputs.
        on_check: called with every comparison.

    Raises:
        BundleError: the bundle lacks the precision or plan, or it failed its check.
        InputError: prompts of the samples have more points than an engine takes.
        SessionError: a graph does not load or run.
        MissingDependencyError: a package is not installed.
    """
    record = bundle.manifest.precision_record(run_on.variant)
    with _open_sessions(bundle, run_on) as sessions:
        return verify_sessions(
            sessions,
            bundle.config,
            goldens,
            backend=run_on.backend,
            precision=run_on.precision,
            tolerances=tolerances_for(run_on.precision, record, in_tensorrt=run_on.in_tensorrt),
            on_check=on_check,
        )


@contextlib.contextmanager
def _open_sessions(bundle: Bundle, run_on: RunOn) -> Iterator[dict[str, Session]]:
    with contextlib.ExitStack() as stack:
        if run_on.on_cpu and run_on.precision == FP16:
            sessions = _rounding_sessions(bundle, run_on.threads)
        else:
            sessions = sessions_from_bundle(bundle, run_on)
        for session in sessions.values():
            stack.enter_context(session)
        yield sessions


def _rounding_sessions(bundle: Bundle, threads: int | None) -> dict[str, Session]:
    require_module("onnx_ir", "a check of fp16 on a CPU", "quantize")
    from tap_deploy.engines.fp16.rounding import load_rounding

    fp16 = bundle.variant(FP16)
    return {
        name: load_rounding(fp16.path(name), spec, threads=threads)
        for name, spec in fp16.specs.items()
    }


def _floors(precision: str, options: VerifyOptions) -> AnswerFloors | None:
    """Return what the answers must reach: on made samples, only those of fp32 say something."""
    if precision == FP32:
        return FP32_FLOORS
    if options.images is None:
        return None
    from tap_deploy.engines.verdict.verdict import Floors

    return AnswerFloors(**dataclasses.asdict(Floors()))


def _token_text(tokenizer: Tokenizer | None) -> Callable[[int], str]:
    def text(token: int) -> str:
        word = "" if tokenizer is None else tokenizer.decode(np.array([[token]]))[0]
        return word or f"token {token}"

    return text


def _conditions(subject: SelftestSubject, options: VerifyOptions) -> dict[str, Any]:
    manifest = subject.bundle.manifest
    return {
        "date": utc_now(),
        "bundle": str(subject.bundle.path),
        "model": manifest.model,
        "weights": manifest.checkpoint.file,
        "machine": subject.device,
        "backend": f"{subject.run_on.mark_name} {subject.backend_version}",
        "precision": subject.run_on.precision,
        "reference": options.reference_name,
    }


class _Mark:
    """Keeps the result of a verification in the bundle.

    On a GPU, the mark of an unfinished one is written first: a bad engine may crash the process.
    """

    def __init__(self, subject: SelftestSubject, *, kept: bool) -> None:
        self._subject = subject
        self._earlier = earlier_mark(subject, "verified") if kept else None
        self._write = subject.recorder("verified") if kept else lambda mark: None

    @contextlib.contextmanager
    def while_running(self) -> Iterator[None]:
        """Keep a failure if a graph does not run in the block; loading is not part of it."""
        if not self._subject.run_on.on_cpu:
            self._write(self._subject.unfinished_mark())
        try:
            yield
        except SessionError as exc:
            self._write(self._mark(passed=False, error=str(exc)))
            raise

    def result(self, found: Verification) -> None:
        """Keep the result; a failure of a verification that compared more stays."""
        earlier, count = self._earlier, len(found.report.checks)
        before = 0 if earlier is None or earlier.passed else earlier.comparisons or 0
        if earlier is not None and found.passed and before > count:
            logger.warning(
                "the failure of an earlier verification stays: it made %d comparisons, this one "
                "%d; repeat it with the same options",
                before,
                count,
            )
            self._write(earlier)
            return
        failed = tuple(str(check) for check in found.report.checks if not check.passed)
        failed += found.failures
        self._write(self._mark(passed=found.passed, comparisons=count, failed=failed))

    def _mark(
        self,
        *,
        passed: bool,
        error: str | None = None,
        comparisons: int | None = None,
        failed: tuple[str, ...] | None = None,
    ) -> SelftestMark:
        subject = self._subject
        return SelftestMark(
            passed=passed,
            backend=subject.run_on.mark_name,
            backend_version=subject.backend_version,
            precision=subject.run_on.precision,
            device=subject.device,
            finished_at=utc_now(),
            comparisons=comparisons,
            failed=failed,
            error=error,
        )


def _near_tie(precision: str, tolerances: Tolerances) -> Tolerance:
    """Return the margin of a near-tie: that of fp16 at most, because int8 has room for faults."""
    own, most = tolerances[CAPTION_IDS], FP16_TOLERANCES[CAPTION_IDS]
    return own if precision == FP32 or own.max < most.max else most
