"""Writing systems: character clusters, line breaks and reading direction."""

from __future__ import annotations

import itertools
import unicodedata
from typing import Literal

Direction = Literal["ltr", "rtl"]

_JOINERS = "\u200c\u200d"  # control how neighbouring letters connect
_DIRECTIONS = "\u200e\u200f\u061c"
_UNSEEN = ("Cc", "Cf", "Cs")  # Unicode categories: controls, formats, surrogates
_MARKS = ("Mn", "Mc", "Me")

_WIDE = "WFH"  # East Asian widths of Chinese, Japanese and Korean characters
_WITHOUT_SPACES = ("THAI", "LAO", "KHMER", "MYANMAR")  # prefixes of Unicode character names
_LEADING_VOWELS = "เแโใไເແໂໃໄ"  # written before the consonant that they belong to
_NO_START = "ะาำๅฯະາຳ"  # may not start a line; nor may closing punctuation and marks
_NO_END = "¥$£€#"  # may not end a line; nor may opening punctuation

_EAST_ASIAN = {  # first word of the Unicode character name -> language
    "CJK": "Chinese",
    "IDEOGRAPHIC": "Chinese",
    "BOPOMOFO": "Chinese",
    "HIRAGANA": "Japanese",
    "KATAKANA": "Japanese",
    "KATAKANA-HIRAGANA": "Japanese",
    "HANGUL": "Korean",
}


def cleaned(text: str) -> str:
    """Return a text on one line, in NFC, without control and format characters."""
    kept = [c for c in unicodedata.normalize("NFC", text) if c.isspace() or _is_read(c)]
    return " ".join("".join(kept).split())


def needs_glyph(character: str) -> bool:
    """Whether a font needs a glyph to draw a character; not so for invisible ones and spaces."""
    if "\ufe00" <= character <= "\ufe0f" or character in "\u034f\u2800\u3164":
        return False  # variation selectors, a joiner, blank letters
    category = unicodedata.category(character)
    return category not in _UNSEEN and category[0] != "Z"


def is_letter(character: str) -> bool:
    """Whether a character is a letter or a mark, not a digit, punctuation or symbol."""
    return needs_glyph(character) and unicodedata.category(character)[0] in "LM"


def clusters(text: str) -> list[str]:
    """Split a text into characters, each with its marks, joiners and trailing spaces."""
    found: list[str] = []
    for character in text:
        follows = character.isspace() or character in _JOINERS or _is_mark(character)
        if found and (follows or found[-1][-1] == "\u200d"):
            found[-1] += character
        else:
            found.append(character)
    return found


def without_marks(cluster: str) -> str:
    """Return the base letter of a cluster."""
    return "".join(c for c in cluster if not _is_mark(c) and c not in _JOINERS) or " "


def pieces(text: str) -> list[str]:
    """Split a text where a line may break: at spaces, and in scripts written without spaces.

    No line starts with closing punctuation or small kana, or ends with opening punctuation.
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
    """Whether the first letter of a text belongs to a right-to-left script."""
    return next((way == "rtl" for way in map(_direction, text) if way), False)


def has_leftward(text: str) -> bool:
    """Whether any letter of a text belongs to a right-to-left script."""
    return not text.isascii() and "rtl" in map(_direction, text)


def needs_shaping(text: str) -> bool:
    """Whether a text has combining marks or right-to-left letters, and needs text shaping."""
    return has_leftward(text) or any(_is_mark(c) and needs_glyph(c) for c in text)


def directions(text: str, *, leftward: bool) -> list[Direction]:
    """Return the reading direction of each character.

    Digits, spaces and punctuation take the direction of the letters around them. Between letters
    of different directions they take that of the paragraph, given by ``leftward``.
    """
    base: Direction = "rtl" if leftward else "ltr"
    before = _last_letters(text, base)
    after = _last_letters(text[::-1], base)[::-1]
    return [b if b == a else base for b, a in zip(before, after, strict=True)]


def kind_and_package(character: str) -> tuple[str, str]:
    """Return the kind of a character in the plural, and the Debian package of a font with them."""
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
    """Whether a character is visible or affects how its neighbours are drawn."""
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
    """Return the reading direction of a letter; None for other characters."""
    kind = unicodedata.bidirectional(character)
    return "rtl" if kind in ("R", "AL") else "ltr" if kind == "L" else None


def _last_letters(text: str, direction: Direction) -> list[Direction]:
    """Return the direction of the last letter up to each character."""
    found = []
    for character in text:
        direction = _direction(character) or direction
        found.append(direction)
    return found
