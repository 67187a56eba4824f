"""Annotation files: JSON whose entries are checked before anything is computed with them."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tap_deploy.errors import InputError, first_line
from tap_deploy.storage.json_files import parse_json
from tap_deploy.storage.regular_files import read_text

Entry = dict[str, Any]
MAX_BYTES = 1 << 31  # the largest annotations, those of the training set of LVIS, have 1.1 GB
_MAX_ID = 1 << 53  # the libraries store ids as float64
_MAX_SIDE = 65_535  # pixels, that of JPEG; the libraries count pixels as uint32
_SHOWN = 60  # characters of a wrong value in a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of value.

    Attributes:
        text: what is expected, for messages.
        fits: whether a parsed JSON value is of this kind.
    """

    text: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    # Not isfinite(): it fails on whole numbers beyond float64.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_box(value: Any) -> bool:
    if not (isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))):
        return False
    return bool(value[2] >= 0 and value[3] >= 0)


def _is_polygon(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) >= 6 and len(value) % 2 == 0
    return is_list and all(map(_is_number, value))


def _is_segmentation(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_polygon, value))
    if not isinstance(value, dict) or not _is_size(value.get("size")):
        return False
    counts = value.get("counts")
    if isinstance(counts, str):
        return True
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        return False
    return sum(counts) == math.prod(value["size"])


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_pixels, value))


def _is_pixels(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MAX_SIDE


def _is_id(value: Any) -> bool:
    return type(value) is int and abs(value) < _MAX_ID


ID = Kind(text="a whole number below 2^53", fits=_is_id)
PIXELS = Kind(text=f"a whole number of at least 1 and at most {_MAX_SIDE}", fits=_is_pixels)
NUMBER = Kind(text="a finite number", fits=_is_number)
TEXT = Kind(text="text", fits=lambda value: isinstance(value, str))
NAME = Kind(
    text="text that is not empty", fits=lambda value: isinstance(value, str) and value != ""
)
FLAG = Kind(text="0 or 1", fits=lambda value: type(value) is int and value in (0, 1))
IDS = Kind(
    text="a list of whole numbers",
    fits=lambda value: isinstance(value, list) and all(map(_is_id, value)),
)
BOX = Kind(text="[x, y, width, height], four finite numbers with no size below 0", fits=_is_box)
SEGMENTATION = Kind(
    text="polygons [[x0, y0, x1, y1, x2, y2, …], …], or run lengths with size and counts",
    fits=_is_segmentation,
)
FREQUENCY = Kind(text="'r', 'c' or 'f'", fits=lambda value: value in ("r", "c", "f"))


class JsonFile:
    """A parsed annotation file.

    Attributes:
        path: the file.
        content: the parsed JSON.
    """

    def __init__(self, path: pathlib.Path, remedy: str) -> None:
        """Read a file.

        Args:
            path: the file.
            remedy: what to do about a wrong file, the end of each message.

        Raises:
            InputError: it cannot be read, is larger than ``MAX_BYTES``, or is not JSON.
        """
        self.path, self._remedy = path, remedy
        try:
            self.content: Any = parse_json(read_text(path, MAX_BYTES))
        except OSError as exc:
            raise InputError(f"{path} cannot be read: {exc.strerror}; {remedy}") from exc
        except ValueError as exc:
            raise InputError(f"{path} is not JSON: {first_line(exc)}; {remedy}") from exc

    def error(self, problem: str) -> InputError:
        """Return an error about this file."""
        return InputError(f"{self.path}: {problem}; {self._remedy}")

    def entries(self, key: str | None, kinds: Mapping[str, Kind]) -> list[Entry]:
        """Return a list of objects after checking their values.

        Args:
            key: name of the list in the file; None if the file is the list.
            kinds: the values that each object must have.

        Raises:
            InputError: there is no such list, or an object lacks a value or has a wrong one.
        """
        found = self.content if key is None else self._member(key)
        if not isinstance(found, list):
            raise self.error(f"{key or 'the file'} is {_shown(found)}; expected a list")
        self.check(found, key or "entry", kinds)
        return found

    def check(self, entries: Sequence[Any], place: str, kinds: Mapping[str, Kind]) -> None:
        """Raise InputError unless each of ``entries`` is an object with values of these kinds."""
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise self.error(f"{place}[{index}] is {_shown(entry)}; expected an object")
            for name, kind in kinds.items():
                if name not in entry:
                    raise self.error(f"{place}[{index}] has no {name!r}; expected {kind.text}")
                if not kind.fits(entry[name]):
                    raise self.error(
                        f"{place}[{index}] has {name} {_shown(entry[name])}; expected {kind.text}"
                    )

    def distinct_ids(self, entries: Sequence[Entry], place: str) -> dict[int, Entry]:
        """Return objects by their ``id``.

        Raises:
            InputError: two have the same, or there is none.
        """
        by_id: dict[int, Entry] = {}
        for index, entry in enumerate(entries):
            if by_id.setdefault(entry["id"], entry) is not entry:
                raise self.error(
                    f"{place}[{index}] has id {entry['id']}, which an earlier one has, too"
                )
        if not by_id:
            raise self.error(f"{place} is empty; expected at least one")
        return by_id

    def check_known(
        self, entries: Sequence[Entry], place: str, name: str, known: Mapping[int, Any]
    ) -> None:
        """Raise InputError unless the value ``name`` of each object is one of ``known``."""
        for index, entry in enumerate(entries):
            if entry[name] not in known:
                raise self.error(
                    f"{place}[{index}] has {name} {entry[name]}, which the annotations do not list"
                )

    def _member(self, key: str) -> Any:
        if not isinstance(self.content, dict):
            raise self.error(
                f"the file holds {_shown(self.content)}; expected an object with {key!r}"
            )
        if key not in self.content:
            raise self.error(f"the file has no {key!r}; it has {_shown(sorted(self.content))}")
        return self.content[key]


def _shown(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, list) or len(value) < _SHOWN else "a list"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
