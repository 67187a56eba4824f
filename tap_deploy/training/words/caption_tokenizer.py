"""The tokenizer of the captions: a SentencePiece model of a few hundred pieces."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tap_deploy.config import BOS_ID, DEMO, EOS_ID, VARIANTS
from tap_deploy.errors import InputError, MissingDependencyError
from tap_deploy.optional_modules import load_module
from tap_deploy.training.scenes.captions import PLACES, RELATIONS, CaptionParts
from tap_deploy.training.scenes.colors import COLOR_WORDS
from tap_deploy.training.scenes.emoji_names import OBJECT_NAMES

DEFAULT_VOCAB_SIZE = VARIANTS[DEMO].vocab_size  # nearly every word is one piece
_NO_COLOR = ("",)
_SIZES = ("", "small", "large")
# It occurs in no caption, so it becomes the last piece, whose id is the padding id. It is a text of
# its own for the training: with required_chars, sentencepiece 0.2.2 ends the process.
_PADDING_CHARACTER = "☐"


def train_tokenizer(
    texts: Iterable[str] | None = None, vocab_size: int = DEFAULT_VOCAB_SIZE
) -> bytes:
    """Return a SentencePiece model, the content of a ``.model`` file.

    The ids are 0 for unknown, 1 for BOS and 2 for EOS; there is no pad piece. The last id is used
    for padding, as in all TAP models, and occurs in no caption. The result is deterministic.

    Args:
        texts: training texts; None for ``every_phrase()``, which covers every caption.
        vocab_size: exact number of pieces.

    Raises:
        InputError: ``vocab_size`` is too large for the texts, or too small for their characters.
        MissingDependencyError: sentencepiece is not installed.
    """
    try:
        sentencepiece: Any = load_module("sentencepiece")
    except ImportError as exc:
        raise MissingDependencyError(
            'sentencepiece is not installed; captions need it: pip install "sentencepiece"'
        ) from exc
    texts = every_phrase() if texts is None else texts
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain(texts, [_PADDING_CHARACTER]),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            normalization_rule_name="identity",  # other rules add 240 KB to the model
            unk_id=0,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,  # the published tokenizer has no pad piece either
            num_threads=1,  # deterministic
            minloglevel=2,
        )
    except RuntimeError as exc:
        raise InputError(
            f"no tokenizer with {vocab_size} pieces can be trained on these texts; expected a few "
            "hundred pieces, and enough words for them"
        ) from exc
    return model.getvalue()


class CaptionEncoder:
    """Encodes captions as rows of ids.

    Args:
        path: path of a SentencePiece model made by ``train_tokenizer``.
        length: number of ids per row L.

    Raises:
        InputError: the file does not exist or is not a SentencePiece model.
    """

    def __init__(self, path: str | os.PathLike[str], length: int) -> None:
        sentencepiece: Any = load_module("sentencepiece")

        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(
                model_proto=Path(path).read_bytes()
            )
        except (OSError, RuntimeError) as exc:
            raise InputError(
                f"tokenizer {path} cannot be used; expected a SentencePiece model"
            ) from exc
        self._length = length
        self.pad_id = int(self._processor.GetPieceSize()) - 1

    def encode(self, captions: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return BOS, the pieces of the caption, EOS, and padding, int64 [P, L].

        Raises:
            InputError: a caption is too long, or contains an unknown piece.
        """
        rows = np.full((len(captions), self._length), self.pad_id, np.int64)
        for row, caption in zip(rows, captions, strict=True):
            ids = [BOS_ID, *self._processor.encode(caption), EOS_ID]
            if len(ids) > self._length or self._processor.unk_id() in ids:
                raise InputError(
                    f"caption {caption!r} takes {len(ids)} ids with BOS and EOS; expected at most "
                    f"{self._length}, and none unknown; train the tokenizer on such captions"
                )
            row[: len(ids)] = ids
        return rows


def every_phrase() -> Iterator[str]:
    """Yield captions that combine every object with every size, colour, place and relation.

    They are not all possible captions, but contain all their parts equally often.
    """
    places = [place for row in PLACES for place in row]
    for index, name in enumerate(OBJECT_NAMES):
        for size, color in itertools.product(_SIZES, (*_NO_COLOR, *COLOR_WORDS)):
            for place in places:
                yield CaptionParts(size=size, color=color, name=name, place=place).text()
            for step, relation in enumerate(RELATIONS, start=1):
                other = OBJECT_NAMES[(index + step) % len(OBJECT_NAMES)]
                yield CaptionParts(
                    size=size, color=color, name=name, relation=relation, neighbor=other
                ).text()
