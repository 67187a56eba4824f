"""What the demo model has to reach, and what it misses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tap_deploy.errors import VerificationError
from tap_deploy.training.scores.evaluation import Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One thing that is asked for.

    Attributes:
        prompt: "box" or "point": how the regions are asked for.
        measure: a field of ``PromptScores``.
        least: what it has to be at least, 0..1.
        text: what it is called in a report.
    """

    prompt: str
    measure: str
    least: float
    text: str

    def found(self, scores: Scores) -> float:
        """Return what was measured."""
        value: float = getattr(getattr(scores, self.prompt), self.measure)
        return value


# Names and captions are judged on the regions of boxes, as published results are.
TARGETS = (
    Target(prompt="box", measure="mask_iou", least=0.82, text="mask mIoU, box prompts"),
    Target(prompt="point", measure="mask_iou", least=0.72, text="mask mIoU, one point"),
    Target(prompt="box", measure="concept_top1", least=0.85, text="concept top-1"),
    Target(prompt="box", measure="concept_top5", least=0.95, text="concept top-5"),
    Target(prompt="box", measure="caption_named", least=0.85, text="caption names the object"),
    Target(prompt="box", measure="caption_exact", least=0.60, text="caption exactly right"),
)


def missed_targets(scores: Mapping[str, Scores]) -> list[str]:
    """Return a line for every target that a subject misses.

    Args:
        scores: by the name of the subject.
    """
    return [
        f"{name}: {target.text} {target.found(score):.3f}, expected at least {target.least:g}"
        for name, score in scores.items()
        for target in TARGETS
        if not target.found(score) >= target.least  # NaN reaches nothing
    ]


def require_targets(scores: Mapping[str, Scores]) -> None:
    """Check that every subject reaches every target.

    Raises:
        VerificationError: one does not; the message has all misses.
    """
    if missed := missed_targets(scores):
        raise VerificationError(
            f"{len(missed)} targets are missed: {'; '.join(missed)}; train longer, or look for "
            "what the conversion lost"
        )
