"""The decode loop of the text decoder: greedy or drawn tokens, early stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tap_deploy import graphs
from tap_deploy.caption_steps import CaptionSteps
from tap_deploy.config import BOS_ID, EOS_ID, TapConfig

if TYPE_CHECKING:  # the package of sessions imports this module
    from tap_deploy.sessions.contract import Session

# At this temperature the draws are as good as even, and their noise still fits into fp16.
HOTTEST = 1e3


class Captioner:
    """Writes captions with the step graph.

    Regions that have finished are dropped once half of the rows are idle; that copies the
    cache, but at most once per halving.
    """

    def __init__(self, session: Session, config: TapConfig) -> None:
        self.session, self.config = session, config

    def generate(
        self,
        semantic_tokens: np.ndarray,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """Write one caption per region.

        Args:
            semantic_tokens: float ``[P, C]``, the token of the chosen mask; cast to the dtype
                of the graph.
            max_new_tokens: at most, and by default, ``config.max_new_tokens``.
            temperature: 0 takes the best token, above 0 draws from the softmax over the
                ``graphs.DRAW_CANDIDATES`` likeliest.
            rng: random state for the draws.

        Returns:
            ids int64 ``[P, text_seq_len - 1]``: BOS, the caption with its EOS, padding.

        Raises:
            SessionError: the backend failed.
        """
        limit = self.config.max_new_tokens
        count = limit if max_new_tokens is None else min(max_new_tokens, limit)
        ids = np.full((len(semantic_tokens), limit + 1), self.config.pad_id, np.int64)
        ids[:, 0] = BOS_ID
        if len(semantic_tokens) == 0 or count == 0:
            return ids
        rows = np.arange(len(semantic_tokens))  # the caption of each row of the batch
        noise = draw_noise(self.config, count, len(rows), temperature, rng)
        steps = CaptionSteps(self.session, self.config, semantic_tokens)
        steps.step(ids[:, 0])
        for position in range(1, count + 1):
            chances = None if noise is None else noise[position - 1, rows]
            ids[rows, position] = steps.step(ids[rows, position - 1], chances)
            finished = finished_rows(ids[rows])
            if finished.all():
                break
            if 2 * finished.sum() >= len(rows):
                steps, rows = steps.keep(~finished), rows[~finished]
        return blank_after_eos(ids, self.config.pad_id)


def finished_rows(ids: np.ndarray) -> np.ndarray:
    """Which rows of ids ``[P, positions]`` hold EOS, bool ``[P]``."""
    finished: np.ndarray = (ids == EOS_ID).any(axis=1)
    return finished


def blank_after_eos(ids: np.ndarray, pad_id: int) -> np.ndarray:
    """Fill what follows the first EOS of each row with padding: rows that wait still decode."""
    after = np.cumsum(ids == EOS_ID, axis=1) - (ids == EOS_ID) > 0
    return np.where(after, pad_id, ids)


def draw_noise(
    config: TapConfig,
    steps: int,
    rows: int,
    temperature: float,
    rng: np.random.Generator | None,
) -> np.ndarray | None:
    """Return what the draws of a batch of captions need, float32 ``[steps, rows, K]``.

    The largest of logit plus temperature times Gumbel noise is a draw from the softmax of the
    logits at that temperature. All of it is made at once, so that no step waits for the host, and
    a caption does not depend on which others have finished.

    Returns:
        None at temperature 0, where nothing is drawn.
    """
    if temperature == 0:
        return None
    rng = np.random.default_rng() if rng is None else rng
    noise = rng.gumbel(size=(steps, rows, graphs.draw_candidates(config)))
    return (noise * min(temperature, HOTTEST)).astype(np.float32)
