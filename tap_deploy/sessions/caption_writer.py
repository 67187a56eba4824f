"""What every decode loop shares: arguments, ids, noise for draws, the blanks after EOS."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import numpy as np

from tap_deploy import graphs
from tap_deploy.config import BOS_ID, EOS_ID, TapConfig

if TYPE_CHECKING:  # the package of sessions imports this module
    pass

# At this temperature all candidates are nearly equally likely, and the noise still fits into fp16.
HOTTEST = 1e3


class CaptionWriter(abc.ABC):
    """What every decode loop has in common: arguments, ids and draws."""

    def __init__(self, config: TapConfig) -> None:
        self.config = config

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
            InputError: more regions than the graph takes.
            SessionError: the backend failed.
        """
        rows, limit = len(semantic_tokens), self.config.max_new_tokens
        count = limit if max_new_tokens is None else min(max_new_tokens, limit)
        ids = np.full((rows, limit + 1), self.config.pad_id, np.int64)
        ids[:, 0] = BOS_ID
        if rows == 0 or count == 0:
            return ids
        noise = draw_noise(self.config, count, rows, temperature, rng)
        self._write(ids[:, : count + 1], semantic_tokens, noise)
        return blank_after_eos(ids, self.config.pad_id)

    @abc.abstractmethod
    def _write(
        self, ids: np.ndarray, semantic_tokens: np.ndarray, noise: np.ndarray | None
    ) -> None:
        """Write captions of P > 0 regions, until each has its EOS or ids are full.

        Args:
            ids: int64 ``[P, 1 + steps]``, filled from position 1 on; BOS stands at 0, and padding
                elsewhere. What stands after EOS is blanked later.
            semantic_tokens: float ``[P, C]``.
            noise: float32 ``[steps, P, K]``, see ``draw_noise``.
        """


def finished_rows(ids: np.ndarray) -> np.ndarray:
    """Return which rows of ids ``[P, positions]`` hold EOS, bool ``[P]``."""
    finished: np.ndarray = (ids == EOS_ID).any(axis=1)
    return finished


def blank_after_eos(ids: np.ndarray, pad_id: int) -> np.ndarray:
    """Replace what follows the first EOS of each row by padding.

    Rows that have finished are decoded on while others have not.
    """
    after = np.cumsum(ids == EOS_ID, axis=1) - (ids == EOS_ID) > 0
    return np.where(after, pad_id, ids)


def draw_noise(
    config: TapConfig,
    steps: int,
    rows: int,
    temperature: float,
    rng: np.random.Generator | None,
) -> np.ndarray | None:
    """Return the noise that draws the tokens of a batch of captions, float32 ``[steps, rows, K]``.

    The largest of logit plus temperature times Gumbel noise is a draw from the softmax of the
    logits at that temperature. The noise of all steps is made at once: no step waits for the host,
    and a caption does not depend on which others have finished.

    Returns:
        None at temperature 0, where nothing is drawn.
    """
    if temperature == 0:
        return None
    rng = np.random.default_rng() if rng is None else rng
    noise = rng.gumbel(size=(steps, rows, graphs.draw_candidates(config)))
    return (noise * min(temperature, HOTTEST)).astype(np.float32)
