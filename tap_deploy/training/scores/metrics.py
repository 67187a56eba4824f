"""Metrics of a caption."""

from __future__ import annotations

import re
from collections.abc import Sequence


def first_name(caption: str, names: Sequence[str]) -> str | None:
    """Return the first of the names that occurs in a caption as whole words, or None.

    If several names start at the same word, the longest is returned: "hot dog", not "hot". Case
    is ignored.
    """
    found = [
        (match.start(), -len(name), name)
        for name in names
        if (match := re.search(rf"\b{re.escape(name)}\b", caption, re.IGNORECASE))
    ]
    return min(found)[2] if found else None
