"""Words of a caption, split like the Penn Treebank tokenizer of the COCO caption evaluation."""

from __future__ import annotations

import re

# Like the Penn Treebank tokenizer, for letters, digits, hyphens and apostrophes. Punctuation is not
# matched, because the evaluation drops it anyway.
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*?(?=n't\b)|n't\b|'[^\W_]+|[^\W_]+(?:-[^\W_]+)*")


def words(caption: str) -> list[str]:
    """Split a caption like the PTB tokenizer, in lower case and without punctuation.

    Hyphenated words stay whole; "n't" and suffixes after an apostrophe are separate words.
    """
    return _WORD.findall(caption.lower())
