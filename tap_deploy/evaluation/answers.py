"""Answers of a subject, picture by picture, in a file that a later run continues."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

from tap_deploy.errors import InputError
from tap_deploy.storage.files import translated_writes

Key = Mapping[str, str]
_KEY, _PICTURE, _ANSWER = "key", "image_id", "answer"
_DIGITS = 8


class Answers:
    """A file of JSON lines: the key, then a line for each picture.

    Attributes:
        path: the file.
        done: ids of the pictures that it holds.
    """

    def __init__(self, path: pathlib.Path, file: IO[bytes], done: set[int]) -> None:
        self.path, self._file, self.done = path, file, done

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: pathlib.Path, key: Key, *, resume: bool) -> Iterator[Answers]:
        """Yield the answers of a key, locked against other processes.

        Args:
            folder: holds the files of all keys; it is made.
            key: what the answers depend on.
            resume: continue a file; a torn last line is dropped.

        Raises:
            InputError: the file exists without ``resume``, is damaged, in use, or of another key,
                or cannot be written.
        """
        path = folder / file_name(key)
        with translated_writes(path):
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+b")  # noqa: SIM115  # closed below
        with file:
            _lock(path, file)
            done = _finished(path, file, key, resume=resume)
            yield cls(path, file, done)

    def add(self, picture: int, answer: Mapping[str, Any]) -> None:
        """Append the answer for a picture.

        Raises:
            InputError: the file cannot be written.
        """
        self._write({_PICTURE: picture, _ANSWER: answer})
        self.done.add(picture)

    def read(self) -> dict[int, dict[str, Any]]:
        """Return all answers by picture."""
        lines = self.path.read_bytes().splitlines()[1:]
        return {line[_PICTURE]: line[_ANSWER] for line in map(json.loads, lines)}

    def _write(self, line: Mapping[str, Any]) -> None:
        with translated_writes(self.path):
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()


def file_name(key: Key) -> str:
    """Return the name of the file of a key: the protocol, and a digest of all of it."""
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
    return f"{key['protocol']}-{digest[:_DIGITS]}.jsonl"


def _lock(path: pathlib.Path, file: IO[bytes]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        raise InputError(
            f"{path} is in use by another evaluation; wait for it, or pass another --output"
        ) from exc


def _finished(path: pathlib.Path, file: IO[bytes], key: Key, *, resume: bool) -> set[int]:
    """Return the pictures of a file after removing a torn last line; begin a new file."""
    file.seek(0)
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.splitlines()
    if len(lines) > 1 and not resume:
        raise InputError(
            f"{path} has answers for {len(lines) - 1} pictures; pass --resume to continue, or "
            "remove it"
        )
    with translated_writes(path):
        file.truncate(len(whole))
        if not lines:
            file.write(json.dumps({_KEY: dict(key)}).encode() + b"\n")
            file.flush()
            return set()
    parsed = [_parsed(path, number, line) for number, line in enumerate(lines, 1)]
    if parsed[0].get(_KEY) != dict(key):
        raise InputError(f"{path} belongs to another evaluation; remove it, or rename it")
    for number, line in enumerate(parsed[1:], 2):
        if type(line.get(_PICTURE)) is not int or not isinstance(line.get(_ANSWER), dict):
            raise _damaged(path, number)
    return {line[_PICTURE] for line in parsed[1:]}


def _parsed(path: pathlib.Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError as exc:
        raise _damaged(path, number) from exc
    if not isinstance(parsed, dict):
        raise _damaged(path, number)
    return parsed


def _damaged(path: pathlib.Path, number: int) -> InputError:
    return InputError(f"{path} is damaged in line {number}; remove it, and evaluate again")
