"""Agreement of captions: equal tokens, first divergences, and the logit margins there."""

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
    """The first difference between a caption and the reference's.

    Attributes:
        position: position of the token, from 1.
        logit_margin: the reference's logit of its own token minus its logit of the candidate's
            token; near 0, the two were nearly tied.
    """

    position: int
    logit_margin: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionAgreement:
    """Agreement of the captions of all regions.

    Attributes:
        tokens_equal: share of the reference's tokens (including EOS) before the first divergence.
        identical: share of captions with identical tokens.
        divergences: number of captions that differ.
        median_position: median position of the first divergences; None without divergences.
        median_margin: median logit margin there; None without divergences.
        largest_margin: largest logit margin there; None without divergences.
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
        """Aggregate the results of single regions."""
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
        expected: caption ids of the reference, int64 [P, L]: BOS, caption with EOS, padding.
        found: caption ids of the candidate, int64 [P, L].
        lengths: tokens of the expected captions, including EOS but not BOS, int [P].

    Returns:
        The number of equal tokens before the first divergence, int [P], and its position in the
        row, 0 for identical captions, int [P].
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
    """Return the reference's logit margins at the first divergences, float64 [D].

    Args:
        session: session of the reference's text decoder.
        config: sizes of the model.
        semantic_tokens: semantic tokens of the reference, float32 [D, C].
        expected: captions of the reference, int64 [D, L].
        found: captions of the candidate, int64 [D, L].
        places: position of the first divergence in each row, at least 1, int [D].
    """
    margins = np.empty(len(places))
    order = np.argsort(places)  # group rows of similar length: a batch runs to its longest row
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
    """Decode one batch with teacher forcing, and return the margins at ``places``."""
    steps = CaptionSteps(session, config, semantic_tokens)
    margins = np.empty(len(places))
    for position in range(1, int(places.max()) + 1):
        steps.step(expected[:, position - 1])
        here = np.flatnonzero(places == position)
        logits = steps.logits[here].astype(np.float64)
        rows = np.arange(len(here))
        margins[here] = logits[rows, expected[here, position]] - logits[rows, found[here, position]]
    return margins
