"""Base class and helpers of the decode loops: arguments, sampling noise, padding after EOS."""

from __future__ import annotations

import abc
from collections.abc import Callable

import numpy as np

from tap_deploy import graphs
from tap_deploy.config import BOS_ID, EOS_ID, TapConfig

OnIds = Callable[[np.ndarray], None]

# Cap on the temperature: the softmax is nearly uniform, and the noise still fits into fp16.
HOTTEST = 1e3


class CaptionWriter(abc.ABC):
    """Base class of the decode loops."""

    def __init__(self, config: TapConfig) -> None:
        self.config = config

    def generate(
        self,
        semantic_tokens: np.ndarray,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        rng: np.random.Generator | None = None,
        on_ids: OnIds | None = None,
    ) -> np.ndarray:
        """Write one caption per region.

        Args:
            semantic_tokens: semantic tokens of the selected masks, float ``[P, C]``; cast to the
                dtype of the graph.
            max_new_tokens: maximum caption length, tokens; None, and the upper bound, is
                ``config.max_new_tokens``.
            temperature: 0 for greedy decoding; above 0 draws from the softmax over the
                ``graphs.DRAW_CANDIDATES`` largest logits.
            rng: random generator of the sampling.
            on_ids: called while captions are written, with the ids so far, int64 ``[P, 1 + n]``:
                after every token on the CPU, every ``eos_interval_steps`` tokens on a GPU. Ids
                after the EOS of a row have no meaning.

        Returns:
            Caption ids, int64 ``[P, text_seq_len - 1]``: BOS, the caption with its EOS, padding.

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
        self._write(ids[:, : count + 1], semantic_tokens, noise, on_ids or _ignore)
        return blank_after_eos(ids, self.config.pad_id)

    @abc.abstractmethod
    def _write(
        self,
        ids: np.ndarray,
        semantic_tokens: np.ndarray,
        noise: np.ndarray | None,
        on_ids: OnIds,
    ) -> None:
        """Decode captions of P > 0 regions until all have EOS or ``ids`` is full.

        Args:
            ids: output, int64 ``[P, 1 + steps]``, initialised with BOS at 0 and padding elsewhere.
                Tokens after EOS are replaced later.
            semantic_tokens: float ``[P, C]``.
            noise: float32 ``[steps, P, K]``, see ``draw_noise``; None for greedy decoding.
            on_ids: see ``generate``.
        """


def finished_rows(ids: np.ndarray) -> np.ndarray:
    """Return which rows of ids ``[P, positions]`` contain EOS, bool ``[P]``."""
    finished: np.ndarray = (ids == EOS_ID).any(axis=1)
    return finished


def blank_after_eos(ids: np.ndarray, pad_id: int) -> np.ndarray:
    """Replace everything after the first EOS of each row by padding.

    Finished rows keep being decoded while other rows of the batch are not finished.
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
    """Return the sampling noise of a batch of captions, float32 ``[steps, rows, K]``.

    Gumbel-max trick: the argmax of logits plus temperature times Gumbel noise is a sample of the
    softmax at that temperature. The noise of all steps is generated up front, so that no step
    waits for the host and a caption does not depend on which others have finished.

    Returns:
        None at temperature 0.
    """
    if temperature == 0:
        return None
    rng = np.random.default_rng() if rng is None else rng
    noise = rng.gumbel(size=(steps, rows, graphs.draw_candidates(config)))
    return (noise * min(temperature, HOTTEST)).astype(np.float32)


def _ignore(ids: np.ndarray) -> None:
    """Take ids that nobody waits for."""
