"""Self-test results in the manifest, for backends that load the ONNX files.

Results of engines are stored next to their plans, see ``plans``.
"""

from __future__ import annotations

import dataclasses

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.precision_record import PrecisionRecord, SelftestMark
from tap_deploy.bundle.update import revise_precision
from tap_deploy.errors import BundleError


def mark_variant(
    bundle: Bundle,
    variant: str,
    name: str,
    mark: SelftestMark,
    *,
    own: SelftestMark | None = None,
) -> None:
    """Store the result of a self-test in the manifest.

    Args:
        bundle: the bundle in the state in which the graphs were tested.
        variant: the tested variant.
        name: key of the result, see ``RunOn.mark_name``; other keys are kept.
        mark: the result.
        own: the mark that this self-test wrote when it started.

    Raises:
        InputError: the bundle cannot be written, or another process has locked it.
        BundleError: the variant was replaced, or another self-test of it failed meanwhile.
    """

    def change(record: PrecisionRecord) -> PrecisionRecord:
        marks = record.selftest or {}
        require_no_failure(marks.get(name), mark, own, f"{variant} of bundle {bundle.path}")
        return dataclasses.replace(record, selftest=marks | {name: mark})

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


def check_mark(bundle: Bundle, variant: str, name: str) -> None:
    """Check that a variant has not failed its self-test; no self-test counts as not failed.

    Raises:
        BundleError: it failed.
    """
    mark = (bundle.manifest.precision_record(variant).selftest or {}).get(name)
    if mark is None or mark.passed:
        return
    raise BundleError(
        f"bundle {bundle.path}: {variant} failed its self-test with {name} on "
        f"{mark.device or 'an unknown machine'}; repeat it with: tap-export selftest "
        f"{bundle.path}, use another precision, or pass allow_failed=True (--allow-failed)"
    )
