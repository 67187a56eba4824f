"""Answers of a subject, picture by picture, in a file that a later run continues."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import IO, Any

from tap_deploy.errors import InputError
from tap_deploy.storage.files import translated_writes
from tap_deploy.storage.json_files import parse_json

logger = logging.getLogger(__name__)
Key = Mapping[str, str]
_KEY, _PICTURE, _ANSWER = "key", "image_id", "answer"
_DIGITS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A part of the pictures, for one of several processes.

    Attributes:
        index: number of the part, from 0.
        count: number of parts.

    Raises:
        InputError: there is no such part.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputError(
                f"shard is {self.index}/{self.count}; expected I/N with I from 0 to N - 1"
            )

    @classmethod
    def from_text(cls, text: str) -> Shard:
        """Return the shard of a text such as ``0/8``.

        Raises:
            InputError: it is not one.
        """
        if (found := re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)) is None:
            raise InputError(f"shard is {text!r}; expected I/N, such as 0/8")
        return cls(index=int(found[1]), count=int(found[2]))


class Answers:
    """A file of JSON lines: the key, then a line for each picture.

    Attributes:
        path: the file.
        done: ids of the pictures that it holds, or those of the shards beside it.
    """

    def __init__(
        self,
        path: pathlib.Path,
        file: IO[bytes],
        done: set[int],
        shards: tuple[pathlib.Path, ...] = (),
    ) -> None:
        self.path, self._file, self.done, self._shards = path, file, done, shards

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, folder: pathlib.Path, key: Key, *, resume: bool, shard: Shard | None = None
    ) -> Iterator[Answers]:
        """Yield the answers of a key, locked against other processes.

        If locks are not available (no ``fcntl``, a file system without locks), there is a warning
        instead.

        Args:
            folder: holds the files of all keys; it is made.
            key: what the answers depend on.
            resume: continue a file, and take the answers of all shards; a torn last line is
                dropped.
            shard: the part to answer, in a file of its own; None for all.

        Raises:
            InputError: the file exists without ``resume``, is damaged, in use, or of another key,
                or cannot be written.
        """
        path = folder / file_name(key, shard)
        with translated_writes(path):
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+b")  # noqa: SIM115  # closed below
        with file:
            _lock(path, file)
            shards = () if shard else tuple(sorted(folder.glob(f"{path.stem}.*-of-*.jsonl")))
            done = _continued(path, file, key)
            for other in shards:
                done |= _pictures(other, _whole_lines(other.read_bytes()), key)
            if done and not resume:
                raise InputError(
                    f"{path} has answers for {len(done)} pictures; pass --resume to continue, or "
                    "remove it"
                )
            yield cls(path, file, done, shards)

    def add(self, picture: int, answer: Mapping[str, Any]) -> None:
        """Append the answer for a picture.

        Raises:
            InputError: the file cannot be written.
        """
        with translated_writes(self.path):
            _write(self._file, {_PICTURE: picture, _ANSWER: answer})
        self.done.add(picture)

    def read(self) -> dict[int, dict[str, Any]]:
        """Return all answers by picture."""
        lines = [
            line
            for path in (*self._shards, self.path)
            for line in _whole_lines(path.read_bytes())[1:]
        ]
        return {line[_PICTURE]: line[_ANSWER] for line in map(json.loads, lines)}


def file_name(key: Key, shard: Shard | None = None) -> str:
    """Return the name of the file of a key: the protocol, and a digest of all of it."""
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
    part = "" if shard is None else f".{shard.index}-of-{shard.count}"
    return f"{key['protocol']}-{digest[:_DIGITS]}{part}.jsonl"


def _write(file: IO[bytes], line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line).encode() + b"\n")
    file.flush()


def _lock(path: pathlib.Path, file: IO[bytes]) -> None:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise InputError(
            f"{path} is in use by another evaluation; wait for it, or pass another --output"
        ) from exc
    except (OSError, ImportError) as exc:
        logger.warning(
            "%s cannot be locked (%s): do not run two evaluations that write it at a time",
            path,
            exc,
        )


def _continued(path: pathlib.Path, file: IO[bytes], key: Key) -> set[int]:
    """Return the pictures of a file after removing a torn last line; begin a new file."""
    file.seek(0)
    lines = _whole_lines(file.read())
    with translated_writes(path):
        file.truncate(sum(len(line) for line in lines))
        if not lines:
            _write(file, {_KEY: dict(key)})
            return set()
    return _pictures(path, lines, key)


def _whole_lines(content: bytes) -> list[bytes]:
    """Return the lines that end with a line break."""
    return [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


def _pictures(path: pathlib.Path, lines: list[bytes], key: Key) -> set[int]:
    """Return the pictures of the lines of a file after checking them."""
    parsed = [_parsed(path, number, line) for number, line in enumerate(lines, 1)]
    if parsed and parsed[0].get(_KEY) != dict(key):
        raise InputError(f"{path} belongs to another evaluation; remove it, or rename it")
    for number, line in enumerate(parsed[1:], 2):
        if type(line.get(_PICTURE)) is not int or not isinstance(line.get(_ANSWER), dict):
            raise _damaged(path, number)
    return {line[_PICTURE] for line in parsed[1:]}


def _parsed(path: pathlib.Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        parsed = parse_json(line)
    except ValueError as exc:
        raise _damaged(path, number) from exc
    if not isinstance(parsed, dict):
        raise _damaged(path, number)
    return parsed


def _damaged(path: pathlib.Path, number: int) -> InputError:
    return InputError(f"{path} is damaged in line {number}; remove it, and evaluate again")
