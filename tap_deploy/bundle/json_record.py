"""Conversion between dataclasses and JSON objects, with type checks."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any, TypeVar

Record = TypeVar("Record")


def record_from_json(kind: type[Record], values: Any) -> Record:
    """Build a dataclass from parsed JSON, checking every value against the type of its field.

    Lists become tuples, and objects become nested dataclasses, if the field has that type. Values
    that are already of the dataclass type are kept.

    Raises:
        TypeError: a field is unknown, missing or of the wrong type.
    """
    hints, found = _hints(typing.cast(type, kind)), json_object(values)
    required = {field.name for field in dataclasses.fields(kind) if _is_required(field)}  # type: ignore[arg-type]
    for problem, names in (("unknown", found.keys() - hints), ("missing", required - found.keys())):
        if names:
            raise TypeError(f"{problem} field {min(names)!r} in {kind.__name__}")
    return kind(**{name: _typed(name, value, hints[name]) for name, value in found.items()})


def record_to_json(record: Any) -> dict[str, Any]:
    """Return a dataclass as plain JSON types.

    Fields that are None are omitted if their default is None; otherwise they become null.
    """
    return {
        field.name: _plain(value)
        for field in dataclasses.fields(record)
        if (value := getattr(record, field.name)) is not None or field.default is not None
    }


def json_object(value: Any) -> dict[str, Any]:
    """Return a parsed JSON value after checking that it is an object.

    Raises:
        TypeError: it is not an object.
    """
    if not isinstance(value, dict):
        raise TypeError(f"got {str(value)[:40]!r} where an object is expected")
    return value


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Convert a JSON value to the type of a field.

    Raises:
        TypeError: the value has another type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is types.UnionType:
        return _typed_as_one_of(name, value, args)
    if origin is dict:
        return {key: _typed(key, item, args[1]) for key, item in json_object(value).items()}
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(name, item, args[0]) for item in value)
    kind: type = origin or hint
    if dataclasses.is_dataclass(kind) and not isinstance(value, kind):
        return record_from_json(kind, value)
    if not _is_a(value, kind):
        raise TypeError(f"{name} is {str(value)[:40]!r}, not {hint}")
    return value


def _typed_as_one_of(name: str, value: Any, hints: tuple[Any, ...]) -> Any:
    """Convert a JSON value to the first type of a union that accepts it."""
    if value is None and type(None) in hints:
        return None
    problems = []
    for hint in hints:
        try:
            if hint is not type(None):
                return _typed(name, value, hint)
        except TypeError as exc:
            problems.append(str(exc))
    raise TypeError("; or: ".join(problems))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return record_to_json(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _is_a(value: Any, kind: type) -> bool:
    """Whether a JSON value has a type; integers count as floats, booleans not as numbers."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
