"""Pictures in a folder, and what happens to those among many that cannot be read."""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tap_deploy.errors import InputError

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpeg", ".jpg", ".mpo"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)

logger = logging.getLogger(__name__)

Picture = TypeVar("Picture")
Result = TypeVar("Result")


def find_pictures(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Return the pictures in a folder and the folders in it, by their suffix, sorted.

    What is hidden, by a name that starts with a dot, is passed over: such files are thumbnails,
    or what a Mac leaves beside each picture (``._photo.jpg``).

    Raises:
        InputError: there is no such folder, or no picture in it.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise InputError(f"folder {root} is not there; expected a folder of pictures")
    found = []
    for place, folders, files in os.walk(root, onerror=_warn_of_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [pathlib.Path(place, name) for name in files if not name.startswith(".")]
        # Path.is_file raises what os.path.isfile takes for a no.
        found += [p for p in paths if p.suffix.lower() in SUFFIXES and os.path.isfile(p)]
    if not found:
        raise InputError(f"folder {root} holds no pictures; expected {', '.join(SUFFIXES)}")
    return sorted(found)


def read_each(
    pictures: Sequence[Picture], read: Callable[[Picture], Result], *, strict: bool = False
) -> Iterator[Result]:
    """Yield what ``read`` makes of each picture; warn of those that it refuses, and go on.

    Args:
        pictures: whatever ``read`` takes. A single one is not skipped: nothing would be left.
        read: raises InputError for what is no picture.
        strict: raise at the first that is refused.

    Raises:
        InputError: all are refused, or one if that is not to be skipped.
    """
    refused: list[InputError] = []
    try:
        for picture in pictures:
            try:
                result = read(picture)
            except InputError as exc:
                if strict or len(pictures) == 1:
                    raise
                logger.warning("skipped: %s", exc)
                refused.append(exc)
            else:
                yield result
        if refused and len(refused) == len(pictures):
            raise InputError(
                f"none of {len(pictures)} pictures can be read; the first: {refused[0]}"
            ) from refused[0]
    finally:
        if refused:
            logger.warning(
                "%d of %d pictures skipped; --strict stops at the first",
                len(refused),
                len(pictures),
            )


def _warn_of_folder(error: OSError) -> None:
    logger.warning("skipped: folder %s cannot be read: %s", error.filename, error.strerror)
