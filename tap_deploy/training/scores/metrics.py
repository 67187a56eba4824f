"""Measures of one answer: masks, points and strokes to ask with, names in captions."""

from __future__ import annotations

import re
from collections.abc import Sequence


def first_name(caption: str, names: Sequence[str]) -> str | None:
    """Return which of the names stands first in a caption, as whole words, or None.

    Of several that begin at the same word the longest counts: "hot dog" is no "hot".
    Capital letters do not matter.
    """
    found = [
        (match.start(), -len(name), name)
        for name in names
        if (match := re.search(rf"\b{re.escape(name)}\b", caption, re.IGNORECASE))
    ]
    return min(found)[2] if found else None
