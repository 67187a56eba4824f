"""The accuracy budget: allowed loss of agreement with the reference through int8."""

from __future__ import annotations

import dataclasses
import math

from tap_deploy.engines.verdict.tally import Agreement, evaluated_on
from tap_deploy.errors import InputError

_KEYS = {"miou": "mask_iou", "top1": "concept_top1", "tokens": "caption_tokens"}
_EXAMPLE = "miou=0.005,top1=0.01,tokens=0.02"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccuracyBudget:
    """Allowed losses of agreement with the reference, 0..1 each; None for no limit.

    Attributes:
        mask_iou: limit on 1 - mean IoU between the masks of reference and candidate.
        concept_top1: limit on the share of regions with another top concept.
        caption_tokens: limit on the share of caption tokens at or after the first divergence.

    Raises:
        InputError: a value is out of range, or nothing is limited.
    """

    mask_iou: float | None = None
    concept_top1: float | None = None
    caption_tokens: float | None = None

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        for name, value in values.items():
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"budget: {name} is {value}; expected 0 to 1")
        if all(value is None for value in values.values()):
            raise InputError(f"budget has no limit; expected, for example, {_EXAMPLE}")

    @classmethod
    def parse(cls, text: str) -> AccuracyBudget:
        """Parse a budget such as ``miou=0.005,top1=0.01,tokens=0.02``.

        Raises:
            InputError: unknown or repeated key, or not a number.
        """
        values: dict[str, float] = {}
        for item in text.split(","):
            key, _, number = item.strip().partition("=")
            try:
                field, value = _KEYS[key], float(number)
            except (KeyError, ValueError) as exc:
                raise InputError(
                    f"budget: cannot read {item.strip()!r}; expected, for example, {_EXAMPLE}"
                ) from exc
            if field in values:
                raise InputError(f"budget: {key} is given twice; expected it once")
            values[field] = value
        return cls(**values)

    def use(self, agreement: Agreement) -> float:
        """Return the used multiple of the budget, the largest ratio of loss to limit.

        At most 1 is within the budget. Any loss against a limit of 0 gives infinity.
        """
        losses = {
            "mask_iou": 1 - agreement.mask_iou,
            "concept_top1": 1 - (1 if agreement.concept_top1 is None else agreement.concept_top1),
            "caption_tokens": 1 - agreement.captions.tokens_equal,
        }
        return max(
            _ratio(losses[name], allowed)
            for name, allowed in dataclasses.asdict(self).items()
            if allowed is not None
        )


def budget_sentence(budget: AccuracyBudget, agreement: Agreement) -> str:
    """Return a sentence that says whether the budget is kept on the evaluation pictures."""
    use = budget.use(agreement)
    where = evaluated_on(agreement.regions, agreement.images)
    if use <= 1:
        return f"budget: kept on {where}, {use:.0%} used"
    return (
        f"budget: EXCEEDED on {where}, {use:.2f} times the limit; calibrate on more pictures, or "
        "exclude more blocks (--exclusions)"
    )


def _ratio(loss: float, allowed: float) -> float:
    if math.isnan(loss):
        return math.inf
    if allowed == 0:
        return math.inf if loss > 0 else 0.0
    return loss / allowed
