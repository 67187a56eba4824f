"""Draws a report as SVG: latency by number of regions, and the stages of the whole call."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

from tap_deploy.bench.tasks import CAPTION, DECODE, ENCODE, END_TO_END
from tap_deploy.storage.files import atomic_file

WIDTH, HEIGHT = 960, 420
COLORS = ("#1f6feb", "#d1572a", "#3a9d5d", "#8957c5", "#b38600", "#57606a")
REST = "rest"
STAGES = {ENCODE: "#1f6feb", DECODE: "#3a9d5d", CAPTION: "#d1572a", REST: "#afb8c1"}
GRAY, INK = "#d0d7de", "#24292f"
TOP, BOTTOM = 64, 340  # of the two diagrams, pixels
Point = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A stage within the end-to-end time of a number of regions.

    Attributes:
        stage: name of the stage; ``REST`` is masks at full size and everything else.
        ms: median latency, ms.
        share: share of the end-to-end time, 0..1.
    """

    stage: str
    ms: float
    share: float


def save_plot(report: Mapping[str, Any], path: pathlib.Path) -> None:
    """Write the plot of a report as an SVG file.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_file(path) as partial:
        partial.write_text(svg(report), "utf-8")


def svg(report: Mapping[str, Any]) -> str:
    """Return the plot of a report as SVG text.

    Left: median latency of whole calls by number of regions, both axes logarithmic, a line per
    candidate; a bar per candidate if there is one number. Right: the share of each stage of the
    bundle's end-to-end time, if the report has the stages.
    """
    root = ET.Element(
        "svg",
        {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {HEIGHT}"},
        **{"font-family": "sans-serif", "font-size": "12", "fill": INK},
    )
    _rectangle(root, 0, 0, WIDTH, HEIGHT, "white")
    conditions = report["conditions"]
    title = f"{conditions['model']} on {conditions['machine']['title']}, {conditions['date'][:10]}"
    _text(root, 16, 24, title, size=15)
    lines, parts = whole_calls(report), stage_parts(report)
    if len({x for points in lines.values() for x, _ in points}) > 1:
        _lines(root, lines, left=60, right=430 if parts else WIDTH - 40)
    else:
        _candidates(root, lines, left=200, right=430 if parts else WIDTH - 120)
    if parts:
        _bars(root, parts, report["subject"], left=520, right=WIDTH - 40)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def whole_calls(report: Mapping[str, Any]) -> dict[str, list[Point]]:
    """Return candidate -> (regions per picture, median ms) of each whole call."""
    found: dict[str, list[Point]] = {}
    for row in report["rows"]:
        for name, values in row["candidates"].items():
            if values["kind"] not in (ENCODE, DECODE, CAPTION):
                point = (values["prompts"], values["latency"]["median_ms"])
                found.setdefault(name, []).append(point)
    return found


def stage_parts(report: Mapping[str, Any]) -> dict[int, list[Part]]:
    """Return regions -> the parts of the bundle's end-to-end time; empty without stages."""
    medians: dict[tuple[str, int], float] = {}
    for row in report["rows"]:
        values = row["candidates"][report["subject"]]
        medians[values["kind"], values["prompts"]] = values["latency"]["median_ms"]
    found = {}
    for (kind, prompts), whole in medians.items():
        if kind != END_TO_END:
            continue
        times = {ENCODE: medians[ENCODE, 1]}
        times |= {stage: medians[stage, prompts] for stage in (DECODE, CAPTION)}
        # On a busy machine, the stages alone can take longer than together.
        total = max(whole, sum(times.values()))
        times[REST] = total - sum(times.values())
        found[prompts] = [Part(stage=stage, ms=ms, share=ms / total) for stage, ms in times.items()]
    return found


def _lines(root: ET.Element, lines: Mapping[str, list[Point]], *, left: int, right: int) -> None:
    """Draw one line per candidate."""
    _text(root, left, 50, "median latency of a whole call, ms, by regions per picture")
    across = _Axis.around([x for points in lines.values() for x, _ in points], left, right)
    up = _Axis.around([y for points in lines.values() for _, y in points], BOTTOM, TOP + 12)
    for y in up.ticks():
        _line(root, [(left, up.at(y)), (right, up.at(y))], GRAY)
        _text(root, left - 6, up.at(y) + 4, f"{y:g}", anchor="end")
    for x in sorted({x for points in lines.values() for x, _ in points}):
        _text(root, across.at(x), BOTTOM + 18, f"{x:g}", anchor="middle")
    for index, (name, points) in enumerate(lines.items()):
        color = COLORS[index % len(COLORS)]
        places = [(across.at(x), up.at(y)) for x, y in points]
        _line(root, places, color, width=2)
        for (x, y), (_, ms) in zip(places, points, strict=True):
            dot = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "3.5", "fill": color}
            ET.SubElement(ET.SubElement(root, "circle", dot), "title").text = f"{name}: {ms:.2f} ms"
        x, y = left + 190 * (index % 2), BOTTOM + 42 + 16 * (index // 2)
        _rectangle(root, x, y - 9, 10, 10, color)
        _text(root, x + 16, y, name)


def _candidates(
    root: ET.Element, lines: Mapping[str, list[Point]], *, left: int, right: int
) -> None:
    """Draw one bar per candidate, for a single number of regions."""
    [(regions, _)] = next(iter(lines.values()))
    _text(root, 16, 50, f"median latency of a whole call with {regions:g} regions, ms")
    most = max(ms for [(_, ms)] in lines.values())
    row = min(48.0, (BOTTOM - TOP) / len(lines))
    for index, (name, [(_, ms)]) in enumerate(lines.items()):
        y, width = TOP + row * (index + 0.5), ms / most * (right - left)
        _text(root, left - 8, y + 4, name, anchor="end")
        _rectangle(root, left, y - 0.35 * row, width, 0.7 * row, COLORS[index % len(COLORS)])
        _text(root, left + width + 6, y + 4, f"{ms:.1f}")


def _bars(
    root: ET.Element, parts: Mapping[int, list[Part]], subject: str, *, left: int, right: int
) -> None:
    """Draw one stacked bar per number of regions."""
    _text(root, left, 50, f"share of each stage of the end-to-end time, {subject}")
    row = (BOTTOM - TOP) / len(parts)
    height = min(36.0, 0.7 * row)
    for index, (prompts, bar) in enumerate(parts.items()):
        y, x = TOP + row * (index + 0.5) - height / 2, float(left)
        _text(root, left - 8, y + height / 2 + 4, f"P={prompts}", anchor="end")
        for part in bar:
            width = part.share * (right - left)
            box = _rectangle(root, x, y, width, height, STAGES[part.stage])
            ET.SubElement(box, "title").text = f"{part.stage}: {part.ms:.2f} ms"
            if width > 34:
                label = f"{100 * part.share:.0f} %"
                white = "white" if part.stage != REST else INK
                _text(root, x + width / 2, y + height / 2 + 4, label, anchor="middle", fill=white)
            x += width
    for index, (stage, color) in enumerate(STAGES.items()):
        x = left + 90 * index
        _rectangle(root, x, BOTTOM + 33, 10, 10, color)
        _text(root, x + 16, BOTTOM + 42, stage)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Axis:
    """A logarithmic axis from ``low`` at pixel ``start`` to ``high`` at pixel ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> _Axis:
        """Return an axis that holds all values, with a margin."""
        return cls(low=min(values) / 1.4, high=max(values) * 1.4, start=start, end=end)

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values on the axis: 1, 2 and 5 times powers of ten."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        return [value for value in values if self.low <= value <= self.high]


def _rectangle(
    root: ET.Element, x: float, y: float, width: float, height: float, fill: str
) -> ET.Element:
    sizes = {"x": x, "y": y, "width": width, "height": height}
    values = {name: f"{value:.1f}" for name, value in sizes.items()}
    return ET.SubElement(root, "rect", values, fill=fill)


def _line(root: ET.Element, points: Sequence[Point], color: str, width: float = 1) -> None:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    values = {"points": places, "stroke": color, "stroke-width": f"{width:g}", "fill": "none"}
    ET.SubElement(root, "polyline", values)


def _text(
    root: ET.Element,
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    fill: str = INK,
    size: int = 12,
) -> None:
    values = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "fill": fill}
    ET.SubElement(root, "text", values | {"font-size": str(size)}).text = text
