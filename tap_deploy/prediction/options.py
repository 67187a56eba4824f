"""Arguments of a prediction beside picture and prompts, checked."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, Literal

import numpy as np

from tap_deploy.concepts import Vocabulary
from tap_deploy.config import TapConfig
from tap_deploy.errors import InputError, require_int

Masks = bool | Literal["rle"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """See ``TapPredictor.predict``.

    Raises:
        InputError: a value cannot be used.
    """

    top_k: int
    masks: Masks
    captions: bool
    vocabulary: Vocabulary | None
    max_new_tokens: int | None
    temperature: float
    seed: int | None
    candidates: bool = False
    clip: bool = False

    def __post_init__(self) -> None:
        require_int("top_k", self.top_k, 1)
        if not isinstance(self.masks, bool) and self.masks != "rle":
            raise InputError(f"masks is {self.masks!r}; expected True, False or 'rle'")
        if self.max_new_tokens is not None:
            require_int("max_new_tokens", self.max_new_tokens, 0)
        if self.seed is not None:
            require_int("seed", self.seed, 0)
        _require_temperature(self.temperature)


def check_vocabulary(vocabulary: Any, config: TapConfig) -> None:
    """Raise InputError unless a vocabulary is one, and of the size of the model."""
    if not isinstance(vocabulary, Vocabulary):
        raise InputError(
            f"vocabulary is a {type(vocabulary).__name__}; expected a Vocabulary, "
            "see Vocabulary.load"
        )
    found, expected = vocabulary.weights.shape[0], config.sem_embed_dim
    if found != expected:
        raise InputError(
            f"concept weights have {found} rows; expected {expected}, "
            "the semantic embedding of this model"
        )


def _require_temperature(value: Any) -> None:
    smallest = np.finfo(np.float32).tiny  # below, the logits divided by it overflow
    is_number = isinstance(value, numbers.Real)
    if not is_number or not (value == 0 or smallest <= value < float("inf")):
        raise InputError(f"temperature is {value!r}; expected 0, or {smallest:.0e} or more")
