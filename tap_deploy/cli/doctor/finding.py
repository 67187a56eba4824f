"""One thing that ``tap-export doctor`` looked at."""

from __future__ import annotations

import dataclasses
from typing import Literal

GIBIBYTE = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    ``status`` is "missing" if something is absent, too old or does not work, and "warning" if it
    may become a hindrance. ``remedy`` is a command, None if nothing is wrong.
    ``required_for`` lists the uses that need it, comma-separated: some of ``USES``, "coco" or
    "raster".
    """

    name: str
    status: Literal["ok", "missing", "warning"]
    detail: str
    remedy: str | None
    required_for: str


def missing_for(use: str, checks: list[Check]) -> list[str]:
    """Return the names of the checks that stand in the way of one of ``USES``."""
    return [c.name for c in checks if c.status == "missing" and use in c.required_for.split(", ")]


def found_or_missing(
    name: str, required_for: str, detail: str, remedy: str, *, found: bool
) -> Check:
    """Return a check that is ok or missing; the remedy is left out if it is ok."""
    return Check(
        name=name,
        status="ok" if found else "missing",
        detail=detail,
        remedy=None if found else remedy,
        required_for=required_for,
    )


def ok_or_warning(name: str, required_for: str, detail: str, remedy: str, *, fine: bool) -> Check:
    """Return a check that is ok or a warning; the remedy is left out if it is ok."""
    check = found_or_missing(name, required_for, detail, remedy, found=fine)
    return check if fine else dataclasses.replace(check, status="warning")


def swap_command(gibibytes: int) -> str:
    """Return the command that adds a swap file."""
    file = "/swapfile"
    return (
        f"sudo fallocate -l {gibibytes}G {file} && sudo chmod 600 {file} && sudo mkswap {file} "
        f"&& sudo swapon {file}"
    )
