"""Verdicts of self-tests in the manifest, for backends that load the ONNX files.

Engines keep theirs beside their plans, see ``plans``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tap_deploy.bundle import Bundle
from tap_deploy.bundle_update import record_precision
from tap_deploy.errors import BundleError

SELFTEST_KEY = "selftest"  # in ``Manifest.precisions``; below it, a verdict per way to run


def mark_name(backend: str, *, on_cpu: bool = True, provider: str | None = None) -> str:
    """Return what a verdict is kept under: a GPU may compute what a CPU does not."""
    return backend if on_cpu else f"{backend}-{provider or 'cuda'}"


def mark_variant(bundle: Bundle, variant: str, name: str, verdict: Mapping[str, Any]) -> None:
    """Keep a verdict, ``{"passed": bool, …}``, JSON types, beside those of other names.

    Raises:
        InputError: the bundle cannot be written.
    """
    known = bundle.manifest.precisions.get(variant, {}).get(SELFTEST_KEY)
    verdicts = dict(known) if isinstance(known, dict) else {}
    record_precision(bundle, variant, {SELFTEST_KEY: verdicts | {name: dict(verdict)}})


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
