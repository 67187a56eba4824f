"""Parses JSON from untrusted sources, and writes JSON that holds file names."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from tap_deploy.storage.regular_files import TEXT_BYTES, read_text

MAX_DEPTH = 100  # lists and objects within each other; ours have up to ten
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: str | os.PathLike[str], limit_bytes: int = TEXT_BYTES) -> Any:
    """Return the content of a JSON file.

    Args:
        path: the file, or a link to it.
        limit_bytes: largest size, bytes.

    Raises:
        OSError: see ``read_bytes``.
        ValueError: see ``parse_json``.
    """
    return parse_json(read_text(path, limit_bytes))


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON, holds a key twice or text that no encoding can write, or is
            nested too deeply. The message has one line.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    too_deep = f"it is nested more than {MAX_DEPTH} levels deep"
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as exc:
        raise ValueError(too_deep) from exc
    if _is_deeper(values, MAX_DEPTH):
        raise ValueError(too_deep)
    if _SURROGATE.search(text):
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as exc:
            raise ValueError("its text holds half of a surrogate pair") from exc
    return values


def json_text(values: Any, indent: int | None = None) -> str:
    """Return JSON with the letters of every script as they are.

    Bytes of file names that are not UTF-8 become escapes, which Python reads back as they were.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(values, indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; programs differ in which of two equal keys they take."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"an object holds {name[:80]!r} twice")
            seen.add(name)
    return values


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects are within each other more than ``depth`` times."""
    level = [value]
    for _ in range(depth):
        level = [
            item
            for holder in level
            if isinstance(holder, (list, dict))
            for item in (holder.values() if isinstance(holder, dict) else holder)
        ]
        if not level:
            return False
    return any(isinstance(item, (list, dict)) for item in level)
