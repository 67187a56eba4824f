"""Captions of regions that were predicted without them, and their texts while they are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from tap_deploy.config import TapConfig
from tap_deploy.errors import InputError
from tap_deploy.prediction.answers import OnIds
from tap_deploy.regions import Regions
from tap_deploy.tokenizer import Tokenizer


def tokens_of(regions: Sequence[Regions], config: TapConfig) -> np.ndarray:
    """Return the semantic tokens of all regions, float32 ``[P, C]``.

    Raises:
        InputError: not a sequence of ``Regions``, or those of another model.
    """
    width = config.image_embed_dim
    if isinstance(regions, Regions) or not all(isinstance(one, Regions) for one in regions):
        raise InputError("regions: expected a list of Regions; pass [regions] for one picture")
    tokens = [np.empty((0, width), np.float32), *(one.semantic_tokens for one in regions)]
    for one in tokens:
        if one.shape[1] != width:
            raise InputError(
                f"regions have semantic tokens of {one.shape[1]} channels; expected {width}: they "
                "were predicted by another model"
            )
    return np.concatenate(tokens)


def with_captions(
    regions: Sequence[Regions], ids: np.ndarray, captions: list[str] | None
) -> list[Regions]:
    """Return copies of the regions, with ids int64 ``[P, L-1]`` and texts [P]."""
    found, start = [], 0
    for one in regions:
        own = slice(start, start + len(one))
        texts = None if captions is None else captions[own]
        found.append(dataclasses.replace(one, caption_ids=ids[own], captions=texts))
        start = own.stop
    return found


class CaptionProgress:
    """Turns the ids of a running batch into the texts of all regions.

    Args:
        count: number of regions.
        tokenizer: decodes ids; None if there are no texts.
        on_captions: called with the texts so far.
    """

    def __init__(
        self,
        count: int,
        tokenizer: Tokenizer | None,
        on_captions: Callable[[list[str]], None] | None,
    ) -> None:
        self._texts = [""] * count
        self._tokenizer, self._on_captions = tokenizer, on_captions

    @property
    def on_ids(self) -> OnIds | None:
        """What ``GraphCalls.caption`` calls; None if nobody waits for texts."""
        return None if self._tokenizer is None or self._on_captions is None else self._note

    def _note(self, rows: slice, ids: np.ndarray) -> None:
        assert self._tokenizer is not None and self._on_captions is not None
        self._texts[rows] = self._tokenizer.decode(ids)
        self._on_captions(list(self._texts))
