"""The decode loop of the text decoder: KV cache, sampling, early stop."""

from __future__ import annotations

import numpy as np

from tap_deploy import graphs
from tap_deploy.config import BOS_ID, EOS_ID, TapConfig
from tap_deploy.sessions.contract import Session


class Captioner:
    """Writes captions with the step graph.

    The cache is sequence-major, one slot per position. A step reads the filled slots where
    they are and writes its own slot where it belongs, so that nothing is copied per step.
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
            semantic_tokens: float32 ``[P, C]``, the token of the chosen mask.
            max_new_tokens: at most, and by default, ``config.max_new_tokens``.
            temperature: 0 takes the best token, above 0 draws from the softmax.
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
        state = _DecodeState(self.session, self.config, semantic_tokens)
        state.prefill()
        for position in range(1, count + 1):
            next_ids = state.decode_step(position, ids[rows, position - 1], temperature, rng)
            ids[rows, position] = next_ids
            finished = (ids[rows] == EOS_ID).any(axis=1)
            if finished.all():
                break
            if 2 * finished.sum() >= len(rows):
                state = state.keep(~finished, position + 1)
                rows = rows[~finished]
        return blank_after_eos(ids, self.config.pad_id)


def blank_after_eos(ids: np.ndarray, pad_id: int) -> np.ndarray:
    """Fill what follows the first EOS of each row with padding: rows that wait still decode."""
    after = np.cumsum(ids == EOS_ID, axis=1) - (ids == EOS_ID) > 0
    return np.where(after, pad_id, ids)


class _DecodeState:
    """Buffers of one batch of rows: cache, token ids, logits."""

    def __init__(self, session: Session, config: TapConfig, semantic_tokens: np.ndarray) -> None:
        self.session, self.config = session, config
        dtypes = {tensor.name: tensor.dtype for tensor in session.spec.inputs}
        dtype = dtypes[graphs.SEMANTIC_TOKENS]
        self.semantic_tokens = np.ascontiguousarray(semantic_tokens, dtype)
        rows = len(semantic_tokens)
        cache_shape = graphs.kv_cache_shape(config, rows)
        self.cache = session.allocate(cache_shape, dtype)
        self.next_ids = session.allocate((rows,), "int32")
        self.logits = session.allocate((rows, config.vocab_size), dtype)

    def prefill(self) -> None:
        """Put the visual prefix into slot 0.

        No runtime takes a past of length 0, so an empty slot stands in; the graph masks it.
        """
        self._run(0, np.full(len(self.semantic_tokens), BOS_ID), past=self.cache[1:2])

    def decode_step(
        self,
        position: int,
        input_ids: np.ndarray,
        temperature: float,
        rng: np.random.Generator | None,
    ) -> np.ndarray:
        """Feed the tokens at ``position`` and return those that follow, int ``[rows]``."""
        self._run(position, input_ids, past=self.cache[:position])
        if temperature == 0:
            return self.next_ids
        return sample(self.logits, temperature, rng or np.random.default_rng())

    def keep(self, wanted: np.ndarray, filled: int) -> _DecodeState:
        """Return a smaller state with the wanted rows and the ``filled`` first slots."""
        smaller = _DecodeState(self.session, self.config, self.semantic_tokens[wanted])
        smaller.cache[:filled] = self.cache[:filled, :, :, wanted]
        return smaller

    def _run(self, position: int, input_ids: np.ndarray, past: np.ndarray) -> None:
        self.session.run(
            {
                graphs.SEMANTIC_TOKENS: self.semantic_tokens,
                graphs.INPUT_IDS: np.asarray(input_ids, np.int32),
                graphs.POSITION: np.array([position], np.int32),
                graphs.PAST_KEY_VALUES: past,
            },
            into={
                graphs.NEXT_IDS: self.next_ids,
                graphs.LOGITS: self.logits,
                graphs.PRESENT_KEY_VALUES: self.cache[position : position + 1],
            },
        )


def sample(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> np.ndarray:
    """Draw one id per row of ``logits`` [P, V] from the softmax at a temperature, int64 [P].

    The largest of logit / temperature plus Gumbel noise is a draw from that softmax.
    """
    noise = rng.gumbel(size=logits.shape)
    drawn: np.ndarray = (logits.astype(np.float64) / temperature + noise).argmax(axis=1)
    return drawn
