"""Comparison of a tensor with its expected value, and the report of all comparisons."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tap_deploy.errors import VerificationError
from tap_deploy.verify.tolerances import Tolerance

_DIFFERENCES = ("max_abs", "max_rel", "mean_abs", "mean_rel")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of one comparison.

    Attributes:
        graph: name of the graph.
        tensor: name of the output.
        sample: name of the sample.
        shape: shape of the output.
        max_abs: largest absolute difference; for choices, the largest margin between the score of
            the actual and of the expected choice.
        max_rel: ``max_abs`` over the largest expected magnitude.
        tolerance: bound on ``max_abs``, or on ``max_rel`` if ``relative``; 0 requires equality.
        mean_abs: mean absolute difference.
        mean_rel: ``mean_abs`` over the mean expected magnitude.
        mean_tolerance: bound on ``mean_rel``; None for no bound.
        relative: whether ``tolerance`` bounds ``max_rel``.
        note: details for the reader, such as the first position where ids differ.
    """

    graph: str
    tensor: str
    sample: str
    shape: tuple[int, ...]
    max_abs: float
    max_rel: float
    tolerance: float
    mean_abs: float = 0.0
    mean_rel: float = 0.0
    mean_tolerance: float | None = None
    relative: bool = False
    note: str = ""

    @property
    def difference(self) -> float:
        """The value that ``tolerance`` bounds."""
        return self.max_rel if self.relative else self.max_abs

    @property
    def passed(self) -> bool:
        """Whether the differences are within the tolerances; False for NaN."""
        mean_fits = self.mean_tolerance is None or self.mean_rel <= self.mean_tolerance
        return self.difference <= self.tolerance and mean_fits

    def __str__(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        shape = "x".join(map(str, self.shape))
        kind = "rel " if self.relative else ""
        mean = "" if self.mean_tolerance is None else f", mean {self.mean_tolerance:.0e}"
        return (
            f"{verdict} {self.graph:15} {self.tensor:20} {self.sample:14} {shape:>18} "
            f"max abs {self.max_abs:.2e}  rel {self.max_rel:.2e}  "
            f"mean rel {self.mean_rel:.2e}  tolerance {kind}{self.tolerance:.0e}{mean}"
            f"{'  (' + self.note + ')' if self.note else ''}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All comparisons of one verification; an empty report has not passed.

    Attributes:
        checks: the comparisons, in order.
        backend: name of the backend.
        precision: precision of the graphs.
    """

    checks: tuple[Comparison, ...]
    backend: str
    precision: str

    @property
    def passed(self) -> bool:
        """Whether there is at least one comparison and none failed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; non-finite differences become null."""
        rows = []
        for check in self.checks:
            row = dataclasses.asdict(check) | {"passed": check.passed}
            for key in _DIFFERENCES:
                row[key] = row[key] if np.isfinite(row[key]) else None
            rows.append(row)
        return {
            "passed": self.passed,
            "backend": self.backend,
            "precision": self.precision,
            "checks": rows,
        }

    def __str__(self) -> str:
        failed = sum(not check.passed for check in self.checks)
        lines = [str(check) for check in self.checks]
        verdict = "PASSED" if self.passed else "FAILED"
        lines.append(
            f"{verdict}: {len(self.checks)} comparisons, {failed} failed "
            f"({self.backend}, {self.precision})"
        )
        return "\n".join(lines)

    def require(self, what: str) -> None:
        """Raise VerificationError unless the report passed; the message starts with ``what``."""
        if self.passed:
            return
        failures = [check for check in self.checks if not check.passed]
        first = failures[0] if failures else None
        detail = (
            f"{first.graph} {first.tensor} ({first.sample}) is off by {first.difference:.2e}, "
            f"tolerance {first.tolerance:.0e}"
            if first
            else "nothing was compared"
        )
        raise VerificationError(
            f"{what}: {len(failures)} of {len(self.checks)} comparisons failed; first: {detail}"
        )


def compare(
    graph: str,
    tensor: str,
    sample: str,
    actual: np.ndarray,
    expected: np.ndarray,
    tolerance: Tolerance | float,
) -> Comparison:
    """Compare two arrays of any shape; different shapes and non-finite values fail.

    A plain number as ``tolerance`` bounds the largest absolute difference.
    """
    bound = tolerance if isinstance(tolerance, Tolerance) else Tolerance(max=tolerance)
    max_abs = max_rel = mean_abs = mean_rel = float("inf")
    finite = np.isfinite(actual).all() and np.isfinite(expected).all()
    if actual.shape == expected.shape and finite:
        difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
        magnitude = np.abs(expected.astype(np.float64))
        max_abs = float(difference.max(initial=0.0))
        max_rel = _share(max_abs, float(magnitude.max(initial=0.0)))
        mean_abs = float(difference.mean()) if difference.size else 0.0
        mean_rel = _share(mean_abs, float(magnitude.mean()) if magnitude.size else 0.0)
    return Comparison(
        graph=graph,
        tensor=tensor,
        sample=sample,
        shape=tuple(actual.shape),
        max_abs=max_abs,
        max_rel=max_rel,
        mean_abs=mean_abs,
        mean_rel=mean_rel,
        tolerance=bound.max,
        mean_tolerance=bound.mean,
        relative=bound.relative,
    )


def compare_choices(
    graph: str,
    tensor: str,
    sample: str,
    shape: tuple[int, ...],
    margins: np.ndarray,
    scale: float,
    tolerance: Tolerance,
    note: str = "",
) -> Comparison:
    """Compare choices (argmax results) by the score margin of those that differ.

    Args:
        graph: name of the graph.
        tensor: name of the output.
        sample: name of the sample.
        shape: shape of the array of choices.
        margins: for each of the K differing choices, the distance between its measured score and
            that of the expected choice, float ``[K]``.
        scale: largest magnitude of the scores.
        tolerance: its ``max`` bounds the largest margin.
        note: details for the reader, such as the first difference.
    """
    finite = np.isfinite(margins).all() and np.isfinite(scale)
    largest = float(margins.max(initial=0.0)) if finite else float("inf")
    return Comparison(
        graph=graph,
        tensor=tensor,
        sample=sample,
        shape=shape,
        max_abs=largest,
        max_rel=_share(largest, scale),
        tolerance=tolerance.max,
        relative=tolerance.relative,
        note=note,
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else part
