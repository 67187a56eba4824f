"""Decoding of caption ids to text with SentencePiece."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from tap_deploy.config import BOS_ID, EOS_ID
from tap_deploy.errors import InputError, MissingDependencyError
from tap_deploy.optional_modules import load_module
from tap_deploy.storage.regular_files import read_bytes

MAX_BYTES = 1 << 26  # a model of 250 000 pieces has 4 MB


class Tokenizer:
    """A SentencePiece model that decodes captions.

    Attributes:
        vocab_size: number of pieces; the last id is also the padding id.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Load a SentencePiece model.

        Raises:
            InputError: the file cannot be read, or is not a SentencePiece model.
            MissingDependencyError: sentencepiece is not installed.
        """
        try:
            sentencepiece: Any = load_module("sentencepiece")
        except ImportError as exc:
            raise MissingDependencyError(
                'sentencepiece is not installed; captions need it: pip install "sentencepiece"'
            ) from exc
        # Read the bytes here: SentencePiece reports missing and corrupt files alike.
        try:
            content = read_bytes(path, MAX_BYTES)
        except OSError as exc:
            raise InputError(f"tokenizer {path} cannot be read: {exc.strerror}") from exc
        self._processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError as exc:
            raise InputError(
                f"tokenizer {path} is not a SentencePiece model ({len(content)} bytes); expected "
                "the .model file that belongs to the checkpoint"
            ) from exc
        self.vocab_size = int(self._processor.GetPieceSize())

    def decode(self, ids: npt.NDArray[np.integer[Any]]) -> list[str]:
        """Return the text of each row of ids, int [P, L].

        BOS (1), padding, and everything from the first EOS (2) on are dropped.

        Raises:
            InputError: not [P, L], or an id outside the vocabulary.
        """
        if ids.ndim != 2:
            raise InputError(f"caption ids have shape {list(ids.shape)}; expected [P, L]")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise InputError(
                f"caption ids reach from {ids.min()} to {ids.max()}; expected 0.."
                f"{self.vocab_size - 1}: the tokenizer belongs to another model"
            )
        return [str(self._processor.DecodeIds(self._text_ids(row.tolist()))) for row in ids]

    def _text_ids(self, row: list[int]) -> list[int]:
        start = 1 if row[:1] == [BOS_ID] else 0
        stop = row.index(EOS_ID) if EOS_ID in row else len(row)
        return [piece for piece in row[start:stop] if piece != self.vocab_size - 1]
