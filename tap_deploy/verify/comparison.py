"""Comparison of a tensor with its expected value, and the report of all comparisons."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from tap_deploy.errors import VerificationError
from tap_deploy.verify.difference import INFINITE, chunks, difference
from tap_deploy.verify.tolerances import Tolerance

_DIFFERENCES = ("max_abs", "max_rel", "mean_abs", "mean_rel", "cosine", "tolerance")

# Name for comparisons of graphs that get the outputs of the graphs before them. In all others, a
# graph gets the reference's own inputs.
END_TO_END = "end to end"

# Edges of the bins of ``Comparison.histogram``: log10 of the absolute difference.
HISTOGRAM_EDGES = tuple(x / 2 for x in range(-20, 5))


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
        cosine: cosine similarity of the flattened tensors; NaN if it is not defined.
        num_nan: number of NaN in the output.
        num_inf: number of infinite values in the output.
        histogram: number of differences of exactly 0, below the first of ``HISTOGRAM_EDGES``,
            between two edges each, and above the last; empty for choices.
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
    cosine: float = math.nan
    num_nan: int = 0
    num_inf: int = 0
    histogram: tuple[int, ...] = ()
    note: str = ""

    @property
    def is_chained(self) -> bool:
        """Whether the graph got the outputs of the graphs before it."""
        return self.graph == END_TO_END

    @property
    def is_bounded(self) -> bool:
        """Whether there is a tolerance; without one, the difference is only measured."""
        return math.isfinite(self.tolerance)

    @property
    def difference(self) -> float:
        """The value that ``tolerance`` bounds."""
        return self.max_rel if self.relative else self.max_abs

    @property
    def passed(self) -> bool:
        """Whether the differences are finite and within the tolerances."""
        mean_fits = self.mean_tolerance is None or self.mean_rel <= self.mean_tolerance
        return math.isfinite(self.difference) and self.difference <= self.tolerance and mean_fits

    @property
    def miss(self) -> str:
        """By how much it is off, and the bound that it leaves."""
        mean = self.mean_tolerance
        if mean is not None and self.mean_rel > mean and self.difference <= self.tolerance:
            return f"is off by {self.mean_rel:.2g} on average, tolerance {mean:.2g}"
        return f"is off by {self.difference:.2g}, tolerance {self.tolerance:.2g}"

    def __str__(self) -> str:
        verdict = "[✗]" if not self.passed else "[✓]" if self.is_bounded else "[-]"
        shape = "x".join(map(str, self.shape))
        cosine = "" if math.isnan(self.cosine) else f"cosine {self.cosine:.7f}  "
        odd = f"{self.num_nan} NaN, {self.num_inf} Inf  " if self.num_nan or self.num_inf else ""
        return (
            f"{verdict} {self.graph:15} {self.tensor:20} {self.sample:26} {shape:>18} "
            f"max abs {self.max_abs:.2e}  rel {self.max_rel:.2e}  "
            f"mean rel {self.mean_rel:.2e}  {cosine}{odd}{self._bound()}"
            f"{'  (' + self.note + ')' if self.note else ''}"
        )

    def _bound(self) -> str:
        if not self.is_bounded:
            return "measured only"
        kind = "rel " if self.relative else ""
        mean = "" if self.mean_tolerance is None else f", mean {self.mean_tolerance:.2g}"
        return f"tolerance {kind}{self.tolerance:.2g}{mean}"


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

    def __add__(self, other: Report) -> Report:
        """Return a report with the comparisons of both."""
        return dataclasses.replace(self, checks=self.checks + other.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; non-finite differences become null."""
        rows = []
        for check in self.checks:
            row = dataclasses.asdict(check) | {"passed": check.passed}
            del row["histogram"]  # for a page, not for a manifest
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
            f"{first.graph} {first.tensor} ({first.sample}) {first.miss}"
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
    finite = np.isfinite(actual).all() and np.isfinite(expected).all()
    fits = actual.shape == expected.shape and finite
    found = difference(actual, expected) if fits else INFINITE
    cosine, histogram = math.nan, tuple[int, ...]()
    if fits and np.issubdtype(actual.dtype, np.floating):
        cosine, histogram = _cosine(actual, expected), _histogram(actual, expected)
    return Comparison(
        graph=graph,
        tensor=tensor,
        sample=sample,
        shape=tuple(actual.shape),
        max_abs=found.max_abs,
        max_rel=found.max_rel,
        mean_abs=found.mean_abs,
        mean_rel=found.mean_rel,
        tolerance=bound.max,
        mean_tolerance=bound.mean,
        relative=bound.relative,
        cosine=cosine,
        num_nan=int(np.isnan(actual).sum()),
        num_inf=int(np.isinf(actual).sum()),
        histogram=histogram,
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


def _cosine(actual: np.ndarray, expected: np.ndarray) -> float:
    product = squares = expected_squares = 0.0
    for a, b in chunks(actual, expected):
        product += float(np.vdot(a, b))
        squares += float(np.vdot(a, a))
        expected_squares += float(np.vdot(b, b))
    norms = math.sqrt(squares * expected_squares)
    return product / norms if norms else math.nan


def _histogram(actual: np.ndarray, expected: np.ndarray) -> tuple[int, ...]:
    counts = np.zeros(len(HISTOGRAM_EDGES) + 2, np.int64)
    for a, b in chunks(actual, expected):
        distances = np.abs(a - b)
        differs = distances[distances > 0]
        counts[0] += len(distances) - len(differs)
        counts[1:] += np.histogram(np.log10(differs), [-np.inf, *HISTOGRAM_EDGES, np.inf])[0]
    return tuple(int(count) for count in counts)
