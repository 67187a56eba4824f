"""Positions of bars and labels in the charts of a page.

Horizontal positions are percent of the width of the chart, so that text keeps its size when the
page is narrow; vertical positions are pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

HISTOGRAM_HEIGHT = 96  # pixels of the highest bar
_SMALLEST_BAR = 1.5  # pixels; a single element among millions stays visible
_MARGIN = 9.0  # percent, for half a label beyond each end of the axis
_MAX_TICKS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogAxis:
    """A log10 axis.

    Attributes:
        low: log10 of the left end.
        high: log10 of the right end, above ``low``.
    """

    low: float
    high: float

    @classmethod
    def around(cls, values: Sequence[float]) -> LogAxis:
        """Return the decades around positive values; no value lies on the left end."""
        logs = [math.log10(value) for value in values] or [0.0]
        return cls(low=math.ceil(min(logs)) - 1, high=math.ceil(max(logs)))

    def position(self, log10: float) -> float:
        """Return the place of a value, percent of the width of the chart."""
        share = (log10 - self.low) / (self.high - self.low)
        return round(_MARGIN + share * (100 - 2 * _MARGIN), 3)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Position and label of some decades, or of the ends if fewer than two lie between."""
        decades = range(math.ceil(self.low), math.floor(self.high) + 1)
        if len(decades) < 2:
            return [(self.position(end), f"{10**end:.1e}") for end in (self.low, self.high)]
        step = math.ceil(len(decades) / _MAX_TICKS)
        return [(self.position(decade), f"1e{decade}") for decade in decades[::step]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar of a chart.

    Attributes:
        x: left edge, percent.
        width: width, percent.
        height: height of an upright bar, pixels; 0 for a level bar.
    """

    x: float
    width: float
    height: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Histogram:
    """An upright histogram.

    Attributes:
        axis: the horizontal axis.
        bars: bars of the bins that are not empty.
        highest: count of the highest bar.
    """

    axis: LogAxis
    bars: tuple[Bar, ...]
    highest: int


def histogram_from_counts(edges: Sequence[float], counts: Sequence[int]) -> Histogram | None:
    """Return a histogram on a log10 axis; None if nothing was counted.

    Args:
        edges: log10 of the n + 1 edges of the bins, ascending.
        counts: the n counts.
    """
    if not any(counts):
        return None
    axis = LogAxis(low=edges[0], high=edges[-1])
    highest = max(counts)
    bars = tuple(
        Bar(
            x=axis.position(left),
            width=round(axis.position(right) - axis.position(left), 3),
            height=round(max(_SMALLEST_BAR, HISTOGRAM_HEIGHT * count / highest), 1),
        )
        for left, right, count in zip(edges, edges[1:], counts, strict=False)
        if count
    )
    return Histogram(axis=axis, bars=bars, highest=highest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedBars:
    """Two level bars a row, on one log10 axis.

    Attributes:
        axis: the horizontal axis.
        rows: name, first bar and second bar of each row; None for a value that is 0 or missing.
    """

    axis: LogAxis
    rows: tuple[tuple[str, Bar | None, Bar | None], ...]


def paired_bars(rows: Sequence[tuple[str, float | None, float | None]]) -> PairedBars:
    """Return two bars a row, from the name and the two values of each."""
    axis = LogAxis.around([value for _, *pair in rows for value in pair if value])
    bars = tuple((name, _level_bar(axis, one), _level_bar(axis, two)) for name, one, two in rows)
    return PairedBars(axis=axis, rows=bars)


def _level_bar(axis: LogAxis, value: float | None) -> Bar | None:
    if not value:
        return None
    left = axis.position(axis.low)
    return Bar(x=left, width=round(axis.position(math.log10(value)) - left, 3))
