"""Writing systems: which characters belong together, where a line may end, which way it is read."""

from __future__ import annotations

import itertools
import unicodedata
from typing import Literal

Direction = Literal["ltr", "rtl"]

_JOINERS = "\u200c\u200d"  # how the letters around them connect
_DIRECTIONS = "\u200e\u200f\u061c"
_UNSEEN = ("Cc", "Cf", "Cs")  # categories: controls, formats, halves of characters
_MARKS = ("Mn", "Mc", "Me")

_WIDE = "WFH"  # what Unicode says of Chinese, Japanese and Korean
_WITHOUT_SPACES = ("THAI", "LAO", "KHMER", "MYANMAR")  # begin the names of their characters
_LEADING_VOWELS = "เแโใไເແໂໃໄ"  # written before the consonant that they belong to
_NO_START = "ะาำๅฯະາຳ"  # of a line, beside closing punctuation and marks
_NO_END = "¥$£€#"  # beside opening punctuation

_EAST_ASIAN = {  # words that names of characters begin with
    "CJK": "Chinese",
    "IDEOGRAPHIC": "Chinese",
    "BOPOMOFO": "Chinese",
    "HIRAGANA": "Japanese",
    "KATAKANA": "Japanese",
    "KATAKANA-HIRAGANA": "Japanese",
    "HANGUL": "Korean",
}


def cleaned(text: str) -> str:
    """Return a text in one line, without the characters that only programs take notice of."""
    kept = [c for c in unicodedata.normalize("NFC", text) if c.isspace() or _is_read(c)]
    return " ".join("".join(kept).split())


def needs_glyph(character: str) -> bool:
    """Whether a font has to have a character to write it: spaces and what is unseen it need not."""
    if "\ufe00" <= character <= "\ufe0f" or character in "\u034f\u2800\u3164":
        return False  # which of two looks is meant, a joiner, letters that are blank
    category = unicodedata.category(character)
    return category not in _UNSEEN and category[0] != "Z"


def is_letter(character: str) -> bool:
    """Whether a character is part of a word: no digit, no punctuation, no symbol."""
    return needs_glyph(character) and unicodedata.category(character)[0] in "LM"


def clusters(text: str) -> list[str]:
    """Cut a text into characters, each with its marks, joiners and the spaces behind it."""
    found: list[str] = []
    for character in text:
        follows = character.isspace() or character in _JOINERS or _is_mark(character)
        if found and (follows or found[-1][-1] == "\u200d"):
            found[-1] += character
        else:
            found.append(character)
    return found


def without_marks(cluster: str) -> str:
    """Return the letter of a cluster alone."""
    return "".join(c for c in cluster if not _is_mark(c) and c not in _JOINERS) or " "


def pieces(text: str) -> list[str]:
    """Cut a text where a line may end: before spaces, and between characters that need none.

    Closing punctuation and small kana begin no line, opening punctuation ends none.
    """
    found: list[str] = []
    for word in text.split():
        parts = clusters(word)
        found.append(f" {parts[0]}" if found else parts[0])
        for before, after in itertools.pairwise(parts):
            if _may_part(before, after):
                found.append(after)
            else:
                found[-1] += after
    return found


def is_leftward(text: str) -> bool:
    """Whether the first letter of a text is of a writing that is read from the right."""
    return next((way == "rtl" for way in map(_direction, text) if way), False)


def has_leftward(text: str) -> bool:
    """Whether any letter of a text is of a writing that is read from the right."""
    return not text.isascii() and "rtl" in map(_direction, text)


def needs_shaping(text: str) -> bool:
    """Whether letters join with their neighbours, stack, or are read from the right."""
    return has_leftward(text) or any(_is_mark(c) and needs_glyph(c) for c in text)


def directions(text: str, *, leftward: bool) -> list[Direction]:
    """Return which way each character is read.

    Digits, spaces and punctuation go with the letters on both sides of them; between letters that
    differ, with the paragraph, which is read ``leftward`` or not.
    """
    base: Direction = "rtl" if leftward else "ltr"
    before = _last_letters(text, base)
    after = _last_letters(text[::-1], base)[::-1]
    return [b if b == a else base for b, a in zip(before, after, strict=True)]


def kind_and_package(character: str) -> tuple[str, str]:
    """Return what a character is one of, and the Debian package of a font that has such."""
    category = unicodedata.category(character)
    first = unicodedata.name(character, "unknown").removeprefix("HALFWIDTH ").split()[0]
    if category[0] == "S":
        return "symbols", "fonts-symbola"
    if first in _EAST_ASIAN or _is_wide(character):
        return f"{_EAST_ASIAN.get(first, 'Chinese')} characters", "fonts-noto-cjk"
    if category[0] == "P":
        return "punctuation marks", "fonts-noto-core"
    return f"{first.capitalize()} characters", "fonts-noto-core"


def _is_read(character: str) -> bool:
    """Whether a character shows, or changes how its neighbours show."""
    return character in _JOINERS + _DIRECTIONS or unicodedata.category(character) not in _UNSEEN


def _may_part(before: str, after: str) -> bool:
    last, first = before[-1], after[0]
    if unicodedata.category(last) in ("Ps", "Pi") or last in _NO_END + _LEADING_VOWELS:
        return False
    if unicodedata.category(first)[0] == "P" and unicodedata.category(first) not in ("Ps", "Pi"):
        return False
    if unicodedata.category(first) in ("Lm", "Sk") or first in _NO_START:
        return False
    if " LETTER SMALL " in unicodedata.name(first, "") and _is_wide(first):
        return False
    return _is_without_spaces(before[0]) or _is_without_spaces(first)


def _is_without_spaces(character: str) -> bool:
    name = unicodedata.name(character, "")
    if _is_wide(character):
        return "HANGUL" not in name
    return name.startswith(_WITHOUT_SPACES)


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in _WIDE


def _is_mark(character: str) -> bool:
    return unicodedata.category(character) in _MARKS


def _direction(character: str) -> Direction | None:
    """Return which way a letter is read; None of what is no letter."""
    kind = unicodedata.bidirectional(character)
    return "rtl" if kind in ("R", "AL") else "ltr" if kind == "L" else None


def _last_letters(text: str, direction: Direction) -> list[Direction]:
    """Return for each character the direction of the last letter up to there."""
    found = []
    for character in text:
        direction = _direction(character) or direction
        found.append(direction)
    return found
