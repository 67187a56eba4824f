"""Finds the pictures in a folder, and skips unreadable ones in a batch."""

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
    """Return the picture files in a folder and its subfolders, selected by suffix and sorted.

    Names that start with a dot are skipped: those are thumbnails, or the ``._photo.jpg`` files
    that macOS writes next to each picture.

    Raises:
        InputError: the folder does not exist or contains no pictures.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise InputError(
            f"folder {root} does not exist; expected a folder of pictures; check the path"
        )
    found = []
    for place, folders, files in os.walk(root, onerror=_warn_of_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [pathlib.Path(place, name) for name in files if not name.startswith(".")]
        # os.path.isfile returns False for errors that Path.is_file raises.
        found += [p for p in paths if p.suffix.lower() in SUFFIXES and os.path.isfile(p)]
    if not found:
        raise InputError(f"folder {root} contains no pictures; expected {', '.join(SUFFIXES)}")
    return sorted(found)


def read_each(
    pictures: Sequence[Picture], read: Callable[[Picture], Result], *, strict: bool = False
) -> Iterator[Result]:
    """Yield ``read(picture)`` for each picture; log a warning for unreadable ones and skip them.

    Args:
        pictures: arguments of ``read``. If there is only one, its error is raised.
        read: raises InputError for an unreadable picture.
        strict: raise the first error instead of skipping the picture.

    Raises:
        InputError: no picture is readable, or one is unreadable and ``strict`` is set.
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
                f"none of {len(pictures)} pictures can be read; first error: {refused[0]}"
            ) from refused[0]
    finally:
        if refused:
            logger.warning(
                "%d of %d pictures skipped; pass --strict to stop at the first error",
                len(refused),
                len(pictures),
            )


def _warn_of_folder(error: OSError) -> None:
    logger.warning("skipped: folder %s cannot be read: %s", error.filename, error.strerror)
