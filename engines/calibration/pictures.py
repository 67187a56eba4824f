"""Selection of calibration pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Collection

import numpy as np

from tap_deploy.errors import InputError
from tap_deploy.image import load_image
from tap_deploy.pictures.folders import find_pictures, read_each
from tap_deploy.storage.files import sha256_of_file
from tap_deploy.storage.json_files import read_json
from tap_deploy.storage.regular_files import read_text

LIST_SUFFIXES = (".txt", ".json")
FEW_IMAGES = 100  # fewer give unreliable ranges; NVIDIA recommends 500 or more for a ViT


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationImages:
    """Distinct pictures, in order.

    Attributes:
        paths: picture files.
        digests: SHA-256 of each file.

    Raises:
        InputError: there are no pictures.
    """

    paths: tuple[pathlib.Path, ...]
    digests: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.paths:
            raise InputError(
                "no calibration pictures; at least 1 is required, 500 or more recommended"
            )

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all pictures in their order."""
        return hashlib.sha256("\n".join(self.digests).encode()).hexdigest()

    def first(self, count: int) -> CalibrationImages:
        """Return at most the first ``count`` pictures."""
        return CalibrationImages(paths=self.paths[:count], digests=self.digests[:count])

    @classmethod
    def from_path(
        cls,
        path: str | os.PathLike[str],
        *,
        samples: int = 500,
        seed: int = 0,
        exclude: Collection[str] = (),
        strict: bool = False,
    ) -> CalibrationImages:
        """Find pictures and read each once.

        If there are several, unreadable ones are skipped with a warning to the logger
        ``tap_deploy``. A single picture given by its path must be readable.

        Args:
            path: a folder, see ``find_pictures``; a picture; a text file with one path per line
                (empty lines and lines that start with ``#`` are skipped); or a JSON list of paths.
                Paths in a list are relative to its folder.
            samples: maximum number of pictures, chosen at random and kept in order.
            seed: seed of the random choice.
            exclude: SHA-256 of pictures to exclude.
            strict: raise for an unreadable picture instead of skipping it.

        Raises:
            InputError: there are no pictures, all are excluded, none can be read (or one cannot,
                if ``strict``), or ``samples`` is below 1.
        """
        if samples < 1:
            raise InputError(f"samples is {samples}; expected at least 1")
        found = _find(pathlib.Path(path))
        order = np.arange(len(found))
        if len(found) > samples:
            order = np.random.default_rng(seed).permutation(len(found))
        places: dict[str, int] = {}
        for place, digest in read_each(
            order.tolist(), lambda place: (place, _digest(found[place])), strict=strict
        ):
            if digest not in exclude:
                places[digest] = min(place, places.get(digest, place))
            if len(places) == samples:
                break
        if found and not places:
            raise InputError(
                f"all {len(found)} pictures of {path} are calibration pictures; pass others"
            )
        kept = sorted(places, key=lambda digest: places[digest])
        return cls(paths=tuple(found[places[digest]] for digest in kept), digests=tuple(kept))


def _digest(path: pathlib.Path) -> str:
    load_image(path, convert=True)  # find unreadable pictures before the long calibration
    return sha256_of_file(path)


def _find(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_dir():
        return find_pictures(path)
    if not path.is_file():
        raise InputError(
            f"calibration data {path} does not exist; expected a folder of pictures, a picture, or "
            "a list of paths (.txt, .json)"
        )
    return _listed(path) if path.suffix.lower() in LIST_SUFFIXES else [path]


def _listed(path: pathlib.Path) -> list[pathlib.Path]:
    try:
        is_json = path.suffix.lower() == ".json"
        entries = read_json(path) if is_json else _lines(read_text(path))
    except (OSError, ValueError) as exc:
        raise InputError(f"list of pictures {path} cannot be read: {exc}") from exc
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise InputError(f"list of pictures {path} is not a list of strings; expected paths")
    if not entries:
        raise InputError(f"list of pictures {path} is empty; expected paths")
    return [path.parent / entry for entry in entries]


def _lines(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]
