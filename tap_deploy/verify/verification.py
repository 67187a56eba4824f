"""The result of a verification: tensors, answers, and where error enters."""

from __future__ import annotations

import dataclasses
from typing import Any

from tap_deploy.errors import VerificationError
from tap_deploy.verify.answers import WorstRegion
from tap_deploy.verify.comparison import Report
from tap_deploy.verify.summary import stages_summary

_ANSWERS = ("masks", "names", "captions")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Verification:
    """A comparison with a reference, from tensors to captions.

    Attributes:
        report: comparisons of all tensors, each graph on its own and in a chain.
        answers: ``masks``, ``names`` and ``captions`` of the chain, see ``answers_summary``.
        failures: agreements of the answers below their floors, as parts of a sentence.
        worst: regions with the lowest mask IoU.
        bisection: the first layer out of tolerance, JSON types; None if it was not searched.
        conditions: date, machine, versions, and what was compared.
    """

    report: Report
    answers: dict[str, Any]
    failures: tuple[str, ...]
    worst: tuple[WorstRegion, ...]
    bisection: dict[str, Any] | None
    conditions: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether all tensors are within tolerance and all answers agree enough."""
        return self.report.passed and not self.failures

    @property
    def sentence(self) -> str:
        """The result in a sentence."""
        checks = self.report.checks
        failed = sum(not check.passed for check in checks)
        parts = [f"{len(checks)} comparisons, {failed} failed", *self.failures]
        return f"{'PASSED' if self.passed else 'FAILED'}: {'; '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            **self.report.to_dict(),
            "passed": self.passed,
            "sentence": self.sentence,
            **self.answers,
            **stages_summary(self.report),
            "bisect": self.bisection,
            "conditions": self.conditions,
        }

    def __str__(self) -> str:
        lines = [str(check) for check in self.report.checks]
        lines += [
            f"{_sign(found['passed'])} {name}: {found['sentence']}"
            for name in _ANSWERS
            if (found := self.answers[name]) is not None
        ]
        lines.append(str(stages_summary(self.report)["stages_sentence"]))
        if self.bisection is not None:
            lines.append(str(self.bisection["sentence"]))
        lines.append(f"{self.sentence} ({self.report.backend}, {self.report.precision})")
        return "\n".join(lines)

    def require(self, what: str) -> None:
        """Raise VerificationError unless it passed; the message starts with ``what``."""
        self.report.require(what)
        if self.failures:
            raise VerificationError(f"{what}: {'; '.join(self.failures)}")


def _sign(passed: bool | None) -> str:
    return "[-]" if passed is None else "[✓]" if passed else "[✗]"
