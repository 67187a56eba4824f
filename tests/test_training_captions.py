"""Rules of captions and their margins; colours; the tokenizer."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from tap_deploy.errors import InputError
from tap_deploy.tokenizer import Tokenizer
from tap_deploy.training.scenes.captions import (
    PLACES,
    RELATIONS,
    Box,
    neighbors,
    parts_from_boxes,
    place_phrase,
    relation_phrase,
    size_word,
)
from tap_deploy.training.scenes.colors import COLOR_WORDS, color_shares
from tap_deploy.training.scenes.emoji_names import OBJECT_NAMES
from tap_deploy.training.words.caption_tokenizer import (
    CaptionEncoder,
    every_phrase,
    train_tokenizer,
)

SIDE = 256


def box_at(x: float, y: float, width: float = 60, height: float = 60) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


@pytest.mark.parametrize(
    ("side", "word"),
    [(56, "small"), (72, "small"), (73, None), (81, None), (82, ""), (102, ""), (103, None),
     (111, None), (112, "large"), (250, "large")],
)  # fmt: skip
def test_the_size_is_that_of_the_longer_side(side, word):
    assert size_word(box_at(128, 128, side, 20), SIDE) == word
    assert size_word(box_at(128, 128, 20, side), SIDE) == word
    assert size_word(box_at(256, 256, 2 * side, 40), 2 * SIDE) == word


def test_the_place_is_one_of_nine():
    middles = (40, 128, 216)
    places = [[place_phrase(box_at(x, y), SIDE) for x in middles] for y in middles]
    assert tuple(map(tuple, places)) == PLACES


@pytest.mark.parametrize("border", [SIDE / 3, 2 * SIDE / 3])
def test_no_place_near_the_borders_between_thirds(border):
    for step in (-6, 0, 6):
        assert place_phrase(box_at(border + step, 128), SIDE) is None
        assert place_phrase(box_at(128, border + step), SIDE) is None
    assert place_phrase(box_at(border + 8, 40), SIDE) is not None


@pytest.mark.parametrize(
    ("dx", "dy", "phrase"),
    [(-60, 0, "left of"), (60, 30, "right of"), (0, -60, "above"), (-30, 60, "below"),
     (60, 45, None), (-60, -60, None), (20, 0, None), (0, 0, None)],
)  # fmt: skip
def test_the_relation_is_the_direction_between_the_centres(dx, dy, phrase):
    assert relation_phrase(box_at(128 + dx, 128 + dy), box_at(128, 128), SIDE) == phrase


@pytest.mark.parametrize(("gap", "near"), [(-20, [1]), (0, [1]), (4, [1]), (5, None), (15, None),
                                           (16, []), (90, [])])  # fmt: skip
def test_neighbours_touch_or_almost(gap, near):
    boxes = [(0.0, 0.0, 60.0, 60.0), (60.0 + gap, 10.0, 120.0 + gap, 70.0)]
    assert neighbors(0, boxes, SIDE) == near
    assert neighbors(1, boxes, SIDE) == (near and [0])


def test_one_neighbour_is_told_and_two_are_not():
    apart, beside, third = box_at(40, 128), box_at(98, 128), box_at(156, 128)
    names = ("apple", "owl", "car")
    parts = parts_from_boxes(0, [apart, beside], names, SIDE)
    assert parts is not None and parts.text() == "a small apple left of an owl"
    parts = parts_from_boxes(0, [apart, beside, third], names, SIDE)
    assert parts is not None and parts.text() == "a small apple left of an owl"
    parts = parts_from_boxes(1, [apart, box_at(128, 128, 116), third], names, SIDE)
    assert parts is not None and parts.text() == "a large owl in the center"
    assert parts_from_boxes(0, [box_at(40, 128, 77)], names, SIDE) is None  # neither small nor not


def test_no_two_captions_read_the_same_and_all_are_short():
    phrases = list(every_phrase())
    assert len(set(phrases)) == len(phrases)
    assert max(len(phrase.split()) for phrase in phrases) <= 13
    text = " | ".join(phrases)
    for words in (*OBJECT_NAMES, *COLOR_WORDS, *RELATIONS, *itertools.chain(*PLACES)):
        assert f" {words} " in f"{text} ", words


def test_no_name_is_another_one_or_holds_it_with_a_color():
    assert len(set(OBJECT_NAMES)) == len(OBJECT_NAMES) >= 110
    assert list(OBJECT_NAMES) == sorted(OBJECT_NAMES)
    words = {word for name in OBJECT_NAMES for word in name.split()}
    assert not words & {*COLOR_WORDS, "small", "large", "left", "right", "above", "below", "a"}


@pytest.mark.parametrize(
    ("rgb", "word"),
    [("e53030", "red"), ("f78a10", "orange"), ("fdd835", "yellow"), ("40a848", "green"),
     ("2585e8", "blue"), ("80209a", "purple"), ("f27fae", "pink"), ("75503f", "brown"),
     ("181818", "black"), ("8a8a8a", "gray"), ("fcfcfc", "white")],
)  # fmt: skip
def test_colors_that_nobody_would_argue_about(rgb, word):
    pixels = np.tile(np.frombuffer(bytes.fromhex(rgb), np.uint8), (5, 1))
    shares = color_shares(pixels)
    assert shares[COLOR_WORDS.index(word)] == 1
    assert shares.sum() == 1


@pytest.mark.parametrize("rgb", ["10d8c8", "808000", "f6ae42", "5838d8", "c2185b", "d0a878"])
def test_colors_that_people_would_argue_about_count_for_none(rgb):
    pixels = np.tile(np.frombuffer(bytes.fromhex(rgb), np.uint8), (5, 1))
    assert color_shares(pixels).sum() == 0


def test_shares_of_colors():
    pixels = np.array([[255, 255, 255]] * 3 + [[0, 0, 0]] * 5 + [[16, 216, 200]] * 2, np.uint8)
    shares = dict(zip(COLOR_WORDS, color_shares(pixels), strict=True))
    assert shares["white"] == pytest.approx(0.3) and shares["black"] == pytest.approx(0.5)
    assert sum(shares.values()) == pytest.approx(0.8)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captions") / "tokenizer.model"
    path.write_bytes(train_tokenizer())
    return path


def test_the_tokenizer_knows_every_caption_and_leaves_the_padding_alone(tokenizer_path):
    tokenizer = Tokenizer(tokenizer_path)
    phrases = list(every_phrase())[::5]
    ids = CaptionEncoder(tokenizer_path, 20).encode(phrases)
    assert ids.dtype == np.int64 and ids.shape == (len(phrases), 20)
    assert (ids[:, 0] == 1).all() and ((ids == 2).sum(axis=1) == 1).all()
    assert tokenizer.decode(ids) == phrases
    assert not (ids == 0).any()
    after = ids.argmax(axis=1)  # the padding id is the highest, so its first place
    assert (np.take_along_axis(ids, after[:, None] - 1, axis=1) == 2).all()
    assert (ids == tokenizer.vocab_size - 1).sum(axis=1).min() >= 4  # short rows are enough


def test_the_tokenizer_is_the_same_every_time_and_as_large_as_asked():
    assert train_tokenizer(vocab_size=300) == train_tokenizer(vocab_size=300)
    captions = ["a red cat on the left", "a car below an owl"] * 20
    content = train_tokenizer(captions, 48)
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    assert processor.GetPieceSize() == 48
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id()) == (0, 1, 2)
    assert processor.pad_id() == -1
    assert processor.decode(processor.encode(captions[0])) == captions[0]


@pytest.mark.parametrize("vocab_size", [5, 20_000])
def test_a_tokenizer_of_an_impossible_size_is_refused(vocab_size):
    with pytest.raises(InputError, match=f"no tokenizer with {vocab_size} pieces"):
        train_tokenizer(["a red cat on the left"] * 9, vocab_size)


def test_a_tokenizer_of_prose_covers_all_of_its_characters(tmp_path):
    """The synthetic assets use a tokenizer trained on arbitrary text."""
    lines = ["Größe ≤ 12 MB → `tap_demo`", "the quick brown fox", "jumps over the lazy dog"]
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(lines * 3, 64))
    encoder = CaptionEncoder(tmp_path / "tokenizer.model", 60)
    assert Tokenizer(tmp_path / "tokenizer.model").decode(encoder.encode(lines)) == lines


def test_the_encoder_refuses_what_does_not_fit(tokenizer_path, tmp_path):
    encoder = CaptionEncoder(tokenizer_path, 6)
    with pytest.raises(InputError, match="takes 7 ids with BOS and EOS; expected at most 6"):
        encoder.encode(["a cat in the center"])
    with pytest.raises(InputError, match="none unknown"):
        encoder.encode(["a Ω"])
    with pytest.raises(InputError, match="expected a SentencePiece model"):
        CaptionEncoder(tmp_path / "missing.model", 6)
