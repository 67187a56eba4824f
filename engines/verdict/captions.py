"""Agreement of captions: equal tokens, where two captions part, and how close a call it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tap_deploy.config import TapConfig
from tap_deploy.sessions.caption_steps import CaptionSteps
from tap_deploy.sessions.contract import Session

_ROWS_PER_CALL = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence:
    """Where a caption first differs from the reference's.

    Attributes:
        position: of the token, from 1.
        logit_margin: the reference's logit of its own token minus that of the candidate's
            there; near 0 the two were a coin toss to the reference itself.
    """

    position: int
    logit_margin: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionAgreement:
    """Agreement of the captions of all regions.

    Attributes:
        tokens_equal: share of the reference's tokens (EOS included) that stand before the first
            divergence.
        identical: share of captions that are equal token for token.
        divergences: how many are not.
        median_position: of the first divergences, None if there are none.
        median_margin: of the logit margins there, None if there are none.
        largest_margin: of the logit margins there, None if there are none.
    """

    tokens_equal: float
    identical: float
    divergences: int
    median_position: float | None
    median_margin: float | None
    largest_margin: float | None

    @classmethod
    def from_regions(
        cls,
        lengths: Sequence[int],
        equal_tokens: Sequence[int],
        divergences: Sequence[Divergence],
    ) -> CaptionAgreement:
        """Sum up what was found region by region."""
        positions = [item.position for item in divergences]
        margins = [item.logit_margin for item in divergences]
        return cls(
            tokens_equal=sum(equal_tokens) / max(1, sum(lengths)),
            identical=1 - len(divergences) / len(lengths),
            divergences=len(divergences),
            median_position=float(np.median(positions)) if positions else None,
            median_margin=float(np.median(margins)) if margins else None,
            largest_margin=float(np.max(margins)) if margins else None,
        )


def first_divergences(
    expected: np.ndarray, found: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compare captions row by row.

    Args:
        expected: ids int64 [P, L]: BOS, the caption with its EOS, padding.
        found: ids of the candidate, likewise.
        lengths: int [P], tokens of the expected captions, EOS included, BOS not.

    Returns:
        how many tokens are equal before the first divergence, int [P]; and its position in
        the row, 0 where the captions are identical, int [P].
    """
    differs = expected != found
    places = np.where(differs.any(axis=1), differs.argmax(axis=1), 0)
    equal = np.where(places > 0, places - 1, lengths)
    return np.minimum(equal, lengths), places


def reference_margins(
    session: Session,
    config: TapConfig,
    semantic_tokens: np.ndarray,
    expected: np.ndarray,
    found: np.ndarray,
    places: np.ndarray,
) -> np.ndarray:
    """Return the reference's logit margins where captions part, float64 [D].

    Args:
        session: the reference's text decoder.
        config: sizes of the model.
        semantic_tokens: float32 [D, C], those of the reference.
        expected: its captions, int64 [D, L].
        found: the candidate's, int64 [D, L].
        places: position of the first divergence in each row, at least 1.
    """
    margins = np.empty(len(places))
    order = np.argsort(places)  # rows of like length together: a batch runs to its longest
    for start in range(0, len(order), _ROWS_PER_CALL):
        rows = order[start : start + _ROWS_PER_CALL]
        margins[rows] = _margins(
            session, config, semantic_tokens[rows], expected[rows], found[rows], places[rows]
        )
    return margins


def _margins(
    session: Session,
    config: TapConfig,
    semantic_tokens: np.ndarray,
    expected: np.ndarray,
    found: np.ndarray,
    places: np.ndarray,
) -> np.ndarray:
    """Feed the expected captions step by step up to the last of the places."""
    steps = CaptionSteps(session, config, semantic_tokens)
    margins = np.empty(len(places))
    for position in range(1, int(places.max()) + 1):
        steps.step(expected[:, position - 1])
        here = np.flatnonzero(places == position)
        logits = steps.logits[here].astype(np.float64)
        rows = np.arange(len(here))
        margins[here] = logits[rows, expected[here, position]] - logits[rows, found[here, position]]
    return margins
