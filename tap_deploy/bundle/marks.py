"""Verdicts of self-tests in the manifest, for backends that load the ONNX files.

Engines keep theirs beside their plans, see ``plans``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.update import Known, revise_precision
from tap_deploy.errors import BundleError

SELFTEST_KEY = "selftest"  # in ``Manifest.precisions``; below it, a verdict per way to run


def mark_name(backend: str, *, on_cpu: bool = True, provider: str | None = None) -> str:
    """Return what a verdict is kept under: a GPU may compute what a CPU does not."""
    return backend if on_cpu else f"{backend}-{provider or 'cuda'}"


def mark_variant(
    bundle: Bundle,
    variant: str,
    name: str,
    verdict: Mapping[str, Any],
    *,
    own: Mapping[str, Any] | None = None,
) -> None:
    """Keep a verdict, ``{"passed": bool, …}``, JSON types, beside those of other names.

    Args:
        bundle: as it was when the graphs were tested.
        variant: what was tested.
        name: what ran it, see ``mark_name``.
        verdict: what came out.
        own: the verdict that this self-test wrote when it began.

    Raises:
        InputError: the bundle cannot be written, or another process holds it.
        BundleError: the variant is another one by now, or another self-test of it failed meanwhile.
    """

    def change(known: Known) -> Known:
        found = known.get(SELFTEST_KEY)
        verdicts = dict(found) if isinstance(found, dict) else {}
        require_no_failure(verdicts.get(name), verdict, own, f"{variant} of bundle {bundle.path}")
        return known | {SELFTEST_KEY: verdicts | {name: dict(verdict)}}

    revise_precision(bundle, variant, change)


def require_no_failure(
    found: Any, verdict: Mapping[str, Any], own: Mapping[str, Any] | None, subject: str
) -> None:
    """Check that a pass does not hide a failure that another self-test found meanwhile.

    Args:
        found: the verdict that would be replaced; None: there is none.
        verdict: the one to be written.
        own: the one that this self-test wrote when it began.
        subject: what was tested, for the message.

    Raises:
        BundleError: it would.
    """
    failed = found is not None and not (isinstance(found, dict) and found.get("passed") is True)
    if verdict.get("passed") is True and own is not None and failed and found != own:
        raise BundleError(
            f"{subject}: this self-test passed, but another one that began meanwhile failed or "
            "still runs; repeat the self-test when no other one runs"
        )


def check_mark(bundle: Bundle, variant: str, name: str) -> None:
    """Refuse a variant that failed its self-test; one that had none is taken.

    Raises:
        BundleError: it failed, or its verdict cannot be read.
    """
    verdicts = bundle.manifest.precisions.get(variant, {}).get(SELFTEST_KEY, {})
    if isinstance(verdicts, dict) and name not in verdicts:
        return
    verdict = verdicts[name] if isinstance(verdicts, dict) else None
    if isinstance(verdict, dict) and verdict.get("passed") is True:
        return
    device = verdict.get("device", "a machine") if isinstance(verdict, dict) else "a machine"
    raise BundleError(
        f"bundle {bundle.path}: {variant} failed its self-test with {name} on {device}; repeat it "
        f"with: tap-export selftest {bundle.path}, use another precision, or allow it with "
        "--allow-failed"
    )
