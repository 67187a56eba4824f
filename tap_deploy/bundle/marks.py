"""Results of self-tests and verifications, one per machine.

Those of backends that load ONNX files are stored in the manifest; those of engines next to their
plans, see ``plans``.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.precision_record import Marks, PrecisionRecord, SelftestMark
from tap_deploy.bundle.update import revise_precision
from tap_deploy.errors import BundleError
from tap_deploy.machine.state import machine_title
from tap_deploy.precisions import FP32

_CHECKS = {"selftest": "self-test", "verified": "verification"}
_EXPORT_BACKEND = "onnxruntime"
# Fields of ``PrecisionRecord`` with marks, and the commands that set them.
MARKS = {"selftest": "selftest", "verified": "verify"}


def mark_variant(
    bundle: Bundle,
    variant: str,
    name: str,
    mark: SelftestMark,
    *,
    own: SelftestMark | None = None,
    field: str = "selftest",
) -> None:
    """Store the result of a self-test or verification in the manifest.

    Args:
        bundle: the bundle in the state in which the graphs were tested.
        variant: the tested variant.
        name: key of the result, see ``RunOn.mark_name``; other keys are kept.
        mark: the result.
        own: the mark that this self-test wrote when it started.
        field: a key of ``MARKS``.

    Raises:
        InputError: the bundle cannot be written, or another process has locked it.
        BundleError: the variant was replaced, or another self-test of it failed meanwhile.
    """

    def change(record: PrecisionRecord) -> PrecisionRecord:
        found = getattr(record, field) or {}
        subject = f"{variant} of bundle {bundle.path}"
        marks = with_mark(found.get(name, {}), mark, own, subject)
        changed: dict[str, Any] = {field: found | {name: marks}}
        return dataclasses.replace(record, **changed)

    revise_precision(bundle, variant, change)


def with_mark(marks: Marks, mark: SelftestMark, own: SelftestMark | None, subject: str) -> Marks:
    """Return marks with a new one, which replaces that of its machine only.

    Args:
        marks: the stored marks.
        mark: the new mark.
        own: the mark that this self-test wrote when it started.
        subject: the tested object, for the message.

    Raises:
        BundleError: the new mark would replace the failure of a concurrent self-test by a pass.
    """
    machine = mark.device or ""
    found = marks.get(machine)
    failed = found is not None and not found.passed
    if mark.passed and own is not None and failed and found != own:
        raise BundleError(
            f"{subject}: this self-test passed, but another one that started meanwhile failed or "
            "is still running; repeat the self-test when no other one is running"
        )
    return marks | {machine: mark}


def failure_for(marks: Marks, machine: str) -> SelftestMark | None:
    """Return the failure that keeps graphs from being used on a machine; None if there is none.

    The result on this machine decides; without one, a failure on any other machine.
    """
    if machine in marks:
        return None if marks[machine].passed else marks[machine]
    return next((mark for mark in marks.values() if not mark.passed), None)


def check_mark(
    bundle: Bundle, variant: str, name: str, options: Sequence[str] = (), *, on_cpu: bool = True
) -> None:
    """Check that a variant has failed neither its self-test nor its verification.

    One that was never tested counts as not failed.

    Args:
        bundle: the bundle.
        variant: the variant to load.
        name: key of the results, see ``RunOn.mark_name``.
        options: options of ``tap-export`` that select it, for the message.
        on_cpu: whether the CPU runs it.

    Raises:
        BundleError: it failed.
    """
    for field, command in MARKS.items():
        marks = marks_of(bundle, variant, name, field)
        failed = failure_for(marks, machine_title(on_cpu=on_cpu)) if marks else None
        if failed is not None:
            words = shlex.join(["tap-export", command, str(bundle.path), *options])
            raise BundleError(
                f"bundle {bundle.path}: {variant} failed its {_CHECKS[field]} with {name} on "
                f"{failed.device or 'an unknown machine'}; repeat it with: {words}, use another "
                "precision, or pass allow_failed=True (--allow-failed)"
            )


def verified_on(bundle: Bundle, variant: str, name: str) -> set[str]:
    """Return the machines on which a variant passed its self-test or its verification.

    Its export verifies the fp32 graphs with onnxruntime, on the machine that exports.
    """
    found = passed_on(*(marks_of(bundle, variant, name, field) for field in MARKS))
    exported_on = bundle.manifest.verification.device
    if (variant, name) == (FP32, _EXPORT_BACKEND) and exported_on is not None:
        found.add(exported_on)
    return found


def passed_on(*checks: Marks) -> set[str]:
    """Return the machines on which any of some checks passed."""
    return {machine for marks in checks for machine, mark in marks.items() if mark.passed}


def marks_of(bundle: Bundle, variant: str, name: str, field: str) -> Marks:
    """Return the marks of a variant under a key of ``MARKS``."""
    found = getattr(bundle.manifest.precision_record(variant), field) or {}
    marks: Marks = found.get(name, {})
    return marks
