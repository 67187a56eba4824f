"""Step-by-step execution of the text decoder on host arrays, with its KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tap_deploy import graphs
from tap_deploy.config import TapConfig

if TYPE_CHECKING:  # avoids a circular import
    from tap_deploy.sessions.contract import Session

# Initial size and growth increment of the cache. Small, because every step reads all slots and most
# captions are short; not smaller, because onnxruntime replans its memory for every new size.
GROWTH_SLOTS = 16


def step_inputs(
    config: TapConfig,
    semantic_tokens: np.ndarray,
    input_ids: np.ndarray,
    position: int,
    cache: np.ndarray,
    gumbel_noise: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Return the inputs of the text decoder for one position.

    Args:
        config: sizes of the model.
        semantic_tokens: ``[P, C]`` in the float dtype of the graph.
        input_ids: tokens at this position, int ``[P]``; ignored at position 0.
        position: position of the step, from 0.
        cache: ``[layers, 2, P, heads, T, head_dim]`` in the float dtype of the graph; the first
            ``position`` slots are filled.
        gumbel_noise: float32 ``[P, K]``, see ``graphs.graph_specs``; None for greedy decoding.
    """
    if gumbel_noise is None:
        gumbel_noise = np.zeros((len(semantic_tokens), 1), np.float32)
    past = cache.reshape(-1, *cache.shape[2:])  # [layers * 2, P, heads, T, head_dim]
    return {
        graphs.SEMANTIC_TOKENS: semantic_tokens,
        graphs.INPUT_IDS: np.ascontiguousarray(input_ids, np.int32),
        graphs.POSITION: np.array([position], np.int32),
        graphs.GUMBEL_NOISE: gumbel_noise,
        **dict(zip(graphs.past_names(config), past, strict=True)),
    }


class CaptionSteps:
    """Decodes the captions of P regions token by token.

    The graph reads the cache in place. Copying the new slot into it costs about 1 % of the bytes
    that a step reads.

    Attributes:
        logits: logits of the last step, ``[P, V]`` in the float dtype of the graph; the next step
            overwrites them.
    """

    def __init__(self, session: Session, config: TapConfig, semantic_tokens: np.ndarray) -> None:
        """Allocate the cache and run position 0, the visual prefix.

        Args:
            session: session of the text decoder.
            config: sizes of the model.
            semantic_tokens: float ``[P, C]``, cast to the dtype of the graph.

        Raises:
            SessionError: the backend failed.
        """
        self._session, self._config = session, config
        self._dtype = session.spec.inputs[0].dtype
        self._tokens = np.ascontiguousarray(semantic_tokens, self._dtype)
        self._position = 0
        self._cache = self._new_cache(GROWTH_SLOTS)
        self._allocate_outputs()
        self.step(np.zeros(len(self._tokens), np.int32))

    def step(self, input_ids: np.ndarray, gumbel_noise: np.ndarray | None = None) -> np.ndarray:
        """Run the next position; the first call runs position 1.

        Args:
            input_ids: tokens at this position, int ``[P]``; BOS at position 1.
            gumbel_noise: float32 ``[P, K]``, see ``graphs.graph_specs``; None for greedy decoding.

        Returns:
            The next tokens, int32 ``[P]``; the next step overwrites them.

        Raises:
            SessionError: the backend failed.
        """
        position = self._position
        if position == self._cache.shape[4]:
            self._grow()
        self._session.run(
            step_inputs(self._config, self._tokens, input_ids, position, self._cache, gumbel_noise),
            into={
                graphs.NEXT_IDS: self._next_ids,
                graphs.LOGITS: self.logits,
                graphs.PRESENT_KEY_VALUES: self._slot,
            },
        )
        self._cache[..., position, :] = self._slot
        self._position += 1
        return self._next_ids

    def keep(self, wanted: np.ndarray) -> None:
        """Keep only the rows selected by ``wanted``, bool ``[P]``; this copies the cache."""
        self._tokens = self._tokens[wanted]
        self._cache = np.ascontiguousarray(self._cache[:, :, wanted])
        self._allocate_outputs()

    def _allocate_outputs(self) -> None:
        rows, slot = len(self._tokens), self._cache.shape[:4] + self._cache.shape[5:]
        self._next_ids = self._session.allocate((rows,), "int32")
        self.logits = self._session.allocate((rows, self._config.vocab_size), self._dtype)
        self._slot = self._session.allocate(slot, self._dtype)

    def _grow(self) -> None:
        filled = self._cache.shape[4]
        grown = self._new_cache(filled + GROWTH_SLOTS)
        grown[..., :filled, :] = self._cache
        self._cache = grown

    def _new_cache(self, slots: int) -> np.ndarray:
        slots = min(slots, self._config.text_seq_len)
        shape = graphs.kv_cache_shape(self._config, len(self._tokens), slots)
        return self._session.allocate(shape, self._dtype)
