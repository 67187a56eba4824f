"""Comparison of a run with a saved one: matching conditions, slowdown of each row."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tap_deploy.bench.report import subject_figures
from tap_deploy.errors import InputError, VerificationError

# Conditions that must be equal for times to be comparable, as paths below ``conditions``.
REQUIRED = (
    *("machine.title", "machine.cpu", "machine.jetson.power_mode.name"),
    *("model", "backend", "precision", "variant", "provider"),
    *("settings.workload", "settings.threads", "settings.tokens", "settings.picture"),
    *("settings.cuda_graphs", "settings.zero_copy"),
)
# Conditions whose change is worth a warning; a regression test may be about one of them.
NOTED = ("weights", "gpu_before.clocks.max.sm", "gpu_before.power.limit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """A row in two runs.

    Attributes:
        row: name of the row.
        before_ms: median latency of the saved run, ms.
        after_ms: median latency of this run, ms.
        is_noisy: whether one of the two was measured on a busy machine.
    """

    row: str
    before_ms: float
    after_ms: float
    is_noisy: bool

    @property
    def slowdown(self) -> float:
        """Growth of the median, 0.05 for 5 % slower; negative if faster."""
        return self.after_ms / self.before_ms - 1

    def __str__(self) -> str:
        noisy = ", noisy" if self.is_noisy else ""
        return (
            f"{self.row} {self.before_ms:.2f} -> {self.after_ms:.2f} ms "
            f"({100 * self.slowdown:+.1f} %{noisy})"
        )


def changes(report: Mapping[str, Any], saved: Mapping[str, Any]) -> list[Change]:
    """Return the rows that both runs have."""
    after, before = subject_figures(dict(report)), subject_figures(dict(saved))
    return [
        Change(
            row=row,
            before_ms=before[row]["latency"]["median_ms"],
            after_ms=after[row]["latency"]["median_ms"],
            is_noisy=before[row]["is_noisy"] or after[row]["is_noisy"],
        )
        for row in after
        if row in before
    ]


def mismatches(report: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Return the required conditions that differ, as text; empty if times are comparable."""
    found = _differences(report["conditions"], saved["conditions"], REQUIRED)
    after, before = subject_figures(dict(report)), subject_figures(dict(saved))
    found += [
        f"caption tokens of {row}: {before[row]['tokens']}, now {after[row]['tokens']}"
        for row in after
        if row in before and before[row]["tokens"] != after[row]["tokens"]
    ]
    if not after.keys() & before.keys():
        found.append(f"rows: {', '.join(before)}, now {', '.join(after)}")
    return found


def remarks(report: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Return other conditions that differ, as text: versions, weights, clocks."""
    now, then = report["conditions"], saved["conditions"]
    names = sorted({*now["versions"], *then["versions"]})
    return [
        *_differences(now, then, NOTED),
        *_differences(now["versions"], then["versions"], names, nested=False),
    ]


def require_no_regression(
    report: Mapping[str, Any], saved: Mapping[str, Any], limit: float
) -> list[Change]:
    """Compare every row with a saved run, and return the changes.

    Args:
        report: this run.
        saved: the saved run.
        limit: allowed slowdown of the median, 0.05 for 5 %.

    Raises:
        InputError: the runs had different conditions.
        VerificationError: a row is slower than allowed.
    """
    different = mismatches(report, saved)
    if different:
        raise InputError(
            f"the saved run is not comparable: {'; '.join(different)}; repeat it under the "
            "conditions of this run, or omit --max-regression"
        )
    found = changes(report, saved)
    slower = [change for change in found if change.slowdown > limit]
    if slower:
        raise VerificationError(
            f"slower than the saved run by more than {100 * limit:g} %: "
            + "; ".join(map(str, slower))
        )
    return found


def _differences(
    now: Mapping[str, Any], then: Mapping[str, Any], paths: Any, *, nested: bool = True
) -> list[str]:
    get = _at if nested else (lambda values, path: values.get(path))
    return [
        f"{path}: {get(then, path)}, now {get(now, path)}"
        for path in paths
        if get(now, path) != get(then, path)
    ]


def _at(values: Any, path: str) -> Any:
    """Return the value at a dotted path; keys may contain dots. None if there is none."""
    if not path or not isinstance(values, Mapping):
        return values if not path else None
    parts = path.split(".")
    for length in range(1, len(parts) + 1):
        key = ".".join(parts[:length])
        if key in values:
            return _at(values[key], ".".join(parts[length:]))
    return None
