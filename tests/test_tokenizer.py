"""The tokenizer, on a tiny SentencePiece model trained on the spot."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest

from tap_deploy.errors import InputError, MissingDependencyError
from tap_deploy.tokenizer import Tokenizer

BOS, EOS = 1, 2
TEXT = "a red cup on the table"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    content = io.BytesIO()
    sentences = [TEXT, "the dog sat on a green chair", "two small birds in the tree"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=content,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(content.getvalue())
    return path


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer(model)


def ids_of(model: Path, text: str) -> list[int]:
    import sentencepiece

    return list(sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(text))


def test_text_stands_between_bos_and_the_first_eos(model: Path, tokenizer: Tokenizer) -> None:
    ids = ids_of(model, TEXT)
    pad = tokenizer.vocab_size - 1
    rest = ids_of(model, "the dog")
    rows = [[BOS, *ids, EOS, *rest, EOS], [BOS, *rest, *[pad] * (len(ids) + 2)]]
    assert tokenizer.decode(np.array(rows)) == [TEXT, "the dog"]
    assert tokenizer.decode(np.array(rows, np.int32)[:, 1:]) == [TEXT, "the dog"]


def test_rows_without_text_are_empty(tokenizer: Tokenizer) -> None:
    pad = tokenizer.vocab_size - 1
    rows = [[BOS, EOS, 5, 6], [BOS, pad, pad, pad], [EOS, 5, 6, 7]]
    assert tokenizer.decode(np.array(rows)) == ["", "", ""]
    assert tokenizer.decode(np.zeros((2, 0), np.int64)) == ["", ""]
    assert tokenizer.decode(np.zeros((0, 39), np.int64)) == []


def test_ids_that_the_tokenizer_does_not_have_are_refused(tokenizer: Tokenizer) -> None:
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(InputError, match="another model"):
            tokenizer.decode(np.array([[BOS, wrong]]))
    with pytest.raises(InputError, match=r"expected \[P, L\]"):
        tokenizer.decode(np.array([BOS, EOS]))


def test_what_is_no_model_is_refused(model: Path, tmp_path: Path) -> None:
    content = model.read_bytes()
    path = tmp_path / "broken.model"
    for broken in (b"", b"hello", bytes(1000), content[: len(content) // 2]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"broken.model is not a SentencePiece model"):
            Tokenizer(path)
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer(tmp_path / "missing.model")
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer(tmp_path)


def test_a_missing_package_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        Tokenizer(model)
