"""Target scores of the demo model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tap_deploy.errors import VerificationError
from tap_deploy.training.scores.evaluation import Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A target score.

    Attributes:
        prompt: kind of prompt, "box" or "point".
        measure: name of a field of ``PromptScores``.
        least: minimum score, 0..1.
        text: name in reports.
    """

    prompt: str
    measure: str
    least: float
    text: str

    def found(self, scores: Scores) -> float:
        """Return the measured score."""
        value: float = getattr(getattr(scores, self.prompt), self.measure)
        return value


# Names and captions are evaluated with box prompts, like published results.
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
        scores: name of the subject -> its scores.
    """
    return [
        f"{name}: {target.text} {target.found(score):.3f}, expected at least {target.least:g}"
        for name, score in scores.items()
        for target in TARGETS
        if not target.found(score) >= target.least  # True for NaN
    ]


def require_targets(scores: Mapping[str, Scores]) -> None:
    """Check that every subject reaches every target.

    Raises:
        VerificationError: a target is missed; the message lists all misses.
    """
    if missed := missed_targets(scores):
        raise VerificationError(
            f"{len(missed)} targets are missed: {'; '.join(missed)}; train longer, or check the "
            "accuracy of the conversion"
        )
