"""One finding of ``tap-export doctor``."""

from __future__ import annotations

import dataclasses
from typing import Literal

GIBIBYTE = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """The state of one part of the machine or the installation.

    Attributes:
        name: the part.
        status: "missing" if it is absent, too old or broken; "warning" if it may cause trouble.
        detail: version or amount, and what is wrong with it.
        remedy: command that fixes it; None if nothing is wrong.
        required_for: uses that need it, comma-separated: some of ``USES``, "coco", "raster",
            "report" or "openvino".
    """

    name: str
    status: Literal["ok", "missing", "warning"]
    detail: str
    remedy: str | None
    required_for: str


def missing_for(use: str, findings: list[Finding]) -> list[str]:
    """Return the names of the findings that block one of ``USES``."""
    return [f.name for f in findings if f.status == "missing" and use in f.required_for.split(", ")]


def found_or_missing(
    name: str, required_for: str, detail: str, remedy: str, *, found: bool
) -> Finding:
    """Return a finding that is ok or missing; the remedy is left out if it is ok."""
    return Finding(
        name=name,
        status="ok" if found else "missing",
        detail=detail,
        remedy=None if found else remedy,
        required_for=required_for,
    )


def ok_or_warning(name: str, required_for: str, detail: str, remedy: str, *, fine: bool) -> Finding:
    """Return a finding that is ok or a warning; the remedy is left out if it is ok."""
    finding = found_or_missing(name, required_for, detail, remedy, found=fine)
    return finding if fine else dataclasses.replace(finding, status="warning")
