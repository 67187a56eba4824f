"""The report of an evaluation: subjects side by side, their differences, published results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tap_deploy.evaluation.answers import Answers
from tap_deploy.evaluation.published import PUBLISHED
from tap_deploy.evaluation.run import EvaluationProtocol, Scores

_GAP = "  "
_NOTHING = "–"  # noqa: RUF001  # the dash of tables
_NOTE = "published: by the authors, whole data set, v1.1 weights; paper: captioner trained further."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Metrics of one or more subjects on one data set.

    Attributes:
        protocol: its name.
        pictures: number of pictures.
        regions: number of regions.
        conditions: what the metrics depend on beside the subjects, by name.
        scores: subject -> metric -> value times 100; the others are compared with the first.
    """

    protocol: str
    pictures: int
    regions: int
    conditions: Mapping[str, str]
    scores: Mapping[str, Scores]

    @property
    def differences(self) -> dict[str, Scores]:
        """Subject -> metric -> value minus that of the first subject."""
        first, *others = self.scores
        return {
            name: {
                metric: _minus(value, self.scores[first][metric])
                for metric, value in self.scores[name].items()
            }
            for name in others
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return dataclasses.asdict(self) | {
            "differences": self.differences,
            "published": PUBLISHED[self.protocol],
        }

    def __str__(self) -> str:
        """Return a table with a line per metric."""
        rows = [*self._heads(), *(self._row(name) for name in next(iter(self.scores.values())))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [_line(row, widths) for row in rows]
        first = next(iter(self.scores))
        about = [f"{self.pictures} pictures, {self.regions} regions"]
        about += [f"{name} {value}" for name, value in self.conditions.items()]
        about += [f"differences to {first}"] if self.differences else []
        return "\n".join([*lines, "", f"{'; '.join(about)}.", _NOTE])

    def _heads(self) -> list[list[str]]:
        """Return the two lines of headings: where a column comes from, and what it is."""
        columns = [("", self.protocol), *map(_two_lines, self.scores)]
        columns += [("difference", _two_lines(name)[1]) for name in self.differences]
        columns += [("published", name) for name in PUBLISHED[self.protocol]]
        return [list(line) for line in zip(*columns, strict=True)]

    def _row(self, metric: str) -> list[str]:
        cells = [metric]
        cells += [_cell(score[metric], ".1f") for score in self.scores.values()]
        cells += [_cell(change[metric], "+.2f") for change in self.differences.values()]
        published = PUBLISHED[self.protocol].values()
        return cells + [_cell(found.get(metric), ".1f") for found in published]


def report_of(protocol: EvaluationProtocol, answers: Mapping[str, Answers]) -> Report:
    """Return the report on complete answers; those about other pictures do not count.

    Args:
        protocol: data set and questions.
        answers: by the name of the subject; the first is compared with the others.
    """
    scores = {}
    for name, each in answers.items():
        found = each.read()
        scores[name] = protocol.score(
            {picture.id: found[picture.id] for picture in protocol.pictures}
        )
    return Report(
        protocol=protocol.name,
        pictures=len(protocol.pictures),
        regions=protocol.num_regions,
        conditions=protocol.conditions,
        scores=scores,
    )


def _two_lines(name: str) -> tuple[str, str]:
    """Return the name of a subject as two headings, such as "onnxruntime" and "int8"."""
    first, _, last = name.rpartition(" ")
    return first, last


def _line(row: list[str], widths: list[int]) -> str:
    first, *rest = (
        cell.ljust(width) if column == 0 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return _GAP.join([first, *rest]).rstrip()


def _minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _cell(value: float | None, form: str) -> str:
    return _NOTHING if value is None else format(value, form)
