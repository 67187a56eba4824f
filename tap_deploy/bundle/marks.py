"""Verdicts of self-tests in the manifest, for backends that load the ONNX files.

Engines keep theirs beside their plans, see ``plans``.
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
    """Keep the outcome of a self-test next to those of other names.

    Args:
        bundle: as it was when the graphs were tested.
        variant: the variant that was tested.
        name: what ran it: the backend, and the provider on a GPU; see ``RunOn.mark_name``.
        mark: the outcome.
        own: the mark that this self-test wrote when it began.

    Raises:
        InputError: the bundle cannot be written, or another process holds it.
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
    """Check that a pass does not hide a failure that another self-test found meanwhile.

    Args:
        found: the mark that would be replaced; None if there is none.
        mark: the mark to be written.
        own: the mark that this self-test wrote when it began.
        subject: what was tested, for the message.

    Raises:
        BundleError: it would.
    """
    failed = found is not None and not found.passed
    if mark.passed and own is not None and failed and found != own:
        raise BundleError(
            f"{subject}: this self-test passed, but another one that began meanwhile failed or "
            "still runs; repeat the self-test when no other one runs"
        )


def check_mark(bundle: Bundle, variant: str, name: str) -> None:
    """Refuse a variant that failed its self-test; one without a self-test is accepted.

    Raises:
        BundleError: it failed.
    """
    mark = (bundle.manifest.precision_record(variant).selftest or {}).get(name)
    if mark is None or mark.passed:
        return
    raise BundleError(
        f"bundle {bundle.path}: {variant} failed its self-test with {name} on "
        f"{mark.device or 'a machine'}; repeat it with: tap-export selftest {bundle.path}, use "
        "another precision, or allow it with --allow-failed"
    )
