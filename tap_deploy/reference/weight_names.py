"""Finds the weights of TAP in a checkpoint, and removes prefixes of training programs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tap_deploy.errors import CheckpointError
from tap_deploy.storage.unpickle import printable

# An entry at the root of every TAP model, and of hardly any other model.
_ROOT_ENTRY = "pixel_rsig"
# Prefixes that DataParallel and torch.compile add to the names of a wrapped module.
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod)\.")
_MAX_DEPTH = 4  # nesting depth of dicts
_MAX_LISTED = 5  # names in a message


def find_weights(payload: object, source: str) -> tuple[dict[Any, Any], tuple[str, ...]]:
    """Return the values of one model by name, and the prefixes removed from the names.

    The model may be nested in dicts, such as ``{"model": {...}, "optimizer": {...}}``, and its
    names may have prefixes, such as ``module.``. It is located by an entry that every TAP model
    has at its root. A flat dict without that entry is returned unchanged.

    Args:
        payload: content of the file.
        source: name of the file in messages.

    Raises:
        CheckpointError: the payload is not a dict, or contains no model or several.
    """
    if not isinstance(payload, dict) or not payload:
        found = "an empty dict" if isinstance(payload, dict) else f"a {type(payload).__name__}"
        raise CheckpointError(
            f"{source} contains {found}; expected a state dict, arrays by name; "
            "check that it is a checkpoint of TAP"
        )
    entries = list(_entries(payload, "", 1, set()))
    roots = [name for name, _ in entries if f".{name}".endswith(f".{_ROOT_ENTRY}")]
    if len(roots) > 1:
        raise CheckpointError(
            f"{source} contains {len(roots)} models ({_listed(roots)}); expected one; save the "
            "weights to use in a separate file"
        )
    if roots:
        return _without_prefixes(entries, roots[0].removesuffix(_ROOT_ENTRY), source)
    if any(isinstance(value, dict) for value in payload.values()):
        found = _listed([name for name, _ in entries]) or "only empty dicts"
        raise CheckpointError(
            f"{source} contains no entry {_ROOT_ENTRY}; found {found}; check that it is a "
            "checkpoint of TAP"
        )
    return payload, ()


def _entries(
    values: dict[Any, Any], prefix: str, depth: int, seen: set[int]
) -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dicts with keys joined by dots; each dict once."""
    for key, value in values.items():
        if not isinstance(key, str):
            continue
        if not isinstance(value, dict) or depth == _MAX_DEPTH:
            yield prefix + key, value
        elif id(value) not in seen:
            seen.add(id(value))
            yield from _entries(value, f"{prefix}{key}.", depth + 1, seen)


def _without_prefixes(
    entries: list[tuple[str, Any]], prefix: str, source: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    weights: dict[str, Any] = {}
    removed = dict.fromkeys([prefix] if prefix else [])
    for full_name, value in entries:
        if not full_name.startswith(prefix):
            continue
        name = full_name.removeprefix(prefix)
        removed |= dict.fromkeys(_WRAPPERS.findall(name))
        name = _WRAPPERS.sub("", name)
        if name in weights:
            raise CheckpointError(
                f"{source} contains entry {printable(name)} twice, the second time as "
                f"{printable(full_name)}; expected one model; save it in a separate file"
            )
        weights[name] = value
    return weights, tuple(map(printable, removed))


def _listed(names: list[str]) -> str:
    more = ", ..." if len(names) > _MAX_LISTED else ""
    return ", ".join(map(printable, names[:_MAX_LISTED])) + more
