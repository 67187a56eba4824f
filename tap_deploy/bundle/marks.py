"""Results of self-tests and verifications in the manifest, for backends that load ONNX files.

Results of engines are stored next to their plans, see ``plans``.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.precision_record import PrecisionRecord, SelftestMark
from tap_deploy.bundle.update import revise_precision
from tap_deploy.errors import BundleError
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
        marks = getattr(record, field) or {}
        require_no_failure(marks.get(name), mark, own, f"{variant} of bundle {bundle.path}")
        changed: dict[str, Any] = {field: marks | {name: mark}}
        return dataclasses.replace(record, **changed)

    revise_precision(bundle, variant, change)


def require_no_failure(
    found: SelftestMark | None, mark: SelftestMark, own: SelftestMark | None, subject: str
) -> None:
    """Check that a passed self-test does not overwrite the failure of a concurrent one.

    Args:
        found: the stored mark; None if there is none.
        mark: the new mark.
        own: the mark that this self-test wrote when it started.
        subject: the tested object, for the message.

    Raises:
        BundleError: the stored mark is the failure of another self-test.
    """
    failed = found is not None and not found.passed
    if mark.passed and own is not None and failed and found != own:
        raise BundleError(
            f"{subject}: this self-test passed, but another one that started meanwhile failed or "
            "is still running; repeat the self-test when no other one is running"
        )


def check_mark(bundle: Bundle, variant: str, name: str, options: Sequence[str] = ()) -> None:
    """Check that a variant has failed neither its self-test nor its verification.

    One that was never tested counts as not failed.

    Args:
        bundle: the bundle.
        variant: the variant to load.
        name: key of the results, see ``RunOn.mark_name``.
        options: options of ``tap-export`` that select it, for the message.

    Raises:
        BundleError: it failed.
    """
    for field, command in MARKS.items():
        mark = mark_of(bundle, variant, name, field)
        if mark is not None and not mark.passed:
            words = shlex.join(["tap-export", command, str(bundle.path), *options])
            raise BundleError(
                f"bundle {bundle.path}: {variant} failed its {_CHECKS[field]} with {name} on "
                f"{mark.device or 'an unknown machine'}; repeat it with: {words}, use another "
                "precision, or pass allow_failed=True (--allow-failed)"
            )


def verified_on(bundle: Bundle, variant: str, name: str) -> set[str]:
    """Return the machines on which a variant passed its self-test or its verification.

    Its export verifies the fp32 graphs with onnxruntime, on the machine that exports.
    """
    marks = [mark_of(bundle, variant, name, field) for field in MARKS]
    found = {mark.device for mark in marks if mark is not None and mark.passed and mark.device}
    exported_on = bundle.manifest.verification.get("device")
    if (variant, name) == (FP32, _EXPORT_BACKEND) and isinstance(exported_on, str):
        found.add(exported_on)
    return found


def mark_of(bundle: Bundle, variant: str, name: str, field: str) -> SelftestMark | None:
    """Return the mark of a variant under a key of ``MARKS``; None if there is none."""
    marks = getattr(bundle.manifest.precision_record(variant), field) or {}
    mark: SelftestMark | None = marks.get(name)
    return mark
