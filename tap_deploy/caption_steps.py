"""The text decoder on host arrays, position by position, with the cache that it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tap_deploy import graphs
from tap_deploy.config import TapConfig

if TYPE_CHECKING:  # the package of sessions imports this module
    from tap_deploy.sessions.contract import Session

# The cache begins with so many slots, and grows by as many. Most captions are short, and every
# step looks at all slots that there are; but onnxruntime plans its memory anew for every size.
GROWTH_SLOTS = 16


class CaptionSteps:
    """The step graph at position 0, 1, 2 … for some regions.

    A graph reads keys and values where they lie; the new slot is copied to its place, which is a
    hundredth of what a step reads.

    next_ids: int32 ``[P]``, what the last step chose; overwritten by the next one.
    logits: float ``[P, V]`` of the last step, in the dtype of the graph; likewise.
    """

    def __init__(self, session: Session, config: TapConfig, semantic_tokens: np.ndarray) -> None:
        """Allocate for a number of regions.

        Args:
            session: runs the text decoder.
            config: sizes of the model.
            semantic_tokens: float ``[P, C]``, cast to the dtype of the graph.
        """
        self._session, self._config = session, config
        self._dtype = session.spec.inputs[0].dtype
        self._tokens = np.ascontiguousarray(semantic_tokens, self._dtype)
        self._names = graphs.past_names(config)
        rows = len(semantic_tokens)
        self._greedy = np.zeros((rows, 1), np.float32)
        self.next_ids = session.allocate((rows,), "int32")
        self.logits = session.allocate((rows, config.vocab_size), self._dtype)
        self._position = 0
        self._cache = self._new_cache(GROWTH_SLOTS)
        self._slot = session.allocate(self._cache.shape[:4] + self._cache.shape[5:], self._dtype)

    def step(self, input_ids: np.ndarray, gumbel_noise: np.ndarray | None = None) -> np.ndarray:
        """Run the next position; the first one is the visual prefix, whatever the ids.

        Args:
            input_ids: int ``[P]``, the tokens at this position.
            gumbel_noise: float32 ``[P, K]``, see ``graphs.graph_specs``; None takes the best token.

        Returns:
            ``next_ids``.

        Raises:
            SessionError: the backend failed.
        """
        position = self._position
        if position == self._cache.shape[4]:
            self._grow()
        past = self._cache.reshape(-1, *self._cache.shape[2:])  # [layers * 2, P, heads, T, dim]
        inputs = {
            graphs.SEMANTIC_TOKENS: self._tokens,
            graphs.INPUT_IDS: np.ascontiguousarray(input_ids, np.int32),
            graphs.POSITION: np.array([position], np.int32),
            graphs.GUMBEL_NOISE: self._greedy if gumbel_noise is None else gumbel_noise,
            **dict(zip(self._names, past, strict=True)),
        }
        outputs = {
            graphs.NEXT_IDS: self.next_ids,
            graphs.LOGITS: self.logits,
            graphs.PRESENT_KEY_VALUES: self._slot,
        }
        self._session.run(inputs, into=outputs)
        self._cache[..., position, :] = self._slot
        self._position += 1
        return self.next_ids

    def keep(self, wanted: np.ndarray) -> CaptionSteps:
        """Return the same for some of the rows, bool ``[P]``; this one must not be used on."""
        smaller = CaptionSteps(self._session, self._config, self._tokens[wanted])
        smaller._position = self._position
        smaller._cache = np.ascontiguousarray(self._cache[:, :, wanted])
        return smaller

    def _grow(self) -> None:
        filled = self._cache.shape[4]
        grown = self._new_cache(min(filled + GROWTH_SLOTS, self._config.text_seq_len))
        grown[..., :filled, :] = self._cache
        self._cache = grown

    def _new_cache(self, slots: int) -> np.ndarray:
        slots = min(slots, self._config.text_seq_len)
        shape = graphs.kv_cache_shape(self._config, len(self._tokens), slots)
        return self._session.allocate(shape, self._dtype)
