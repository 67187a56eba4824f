"""The pictures of a data set, and where they lie."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterable

from tap_deploy.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataPicture:
    """A picture of a data set.

    Attributes:
        id: its id in the annotations.
        names: paths relative to the folder of the pictures, of which the first that exists is it.
        size: height and width in pixels, as annotated; None if the annotations have none.
        path: where it was found; None before ``located``.
    """

    id: int
    names: tuple[str, ...]
    size: tuple[int, int] | None
    path: pathlib.Path | None = None

    def check_size(self, height: int, width: int) -> None:
        """Raise InputError unless the picture has the annotated size."""
        if self.size is not None and self.size != (height, width):
            raise InputError(
                f"picture {self.path} has {width} x {height} pixels; the annotations say "
                f"{self.size[1]} x {self.size[0]}; check --images"
            )


def located(pictures: Iterable[DataPicture], folder: pathlib.Path) -> tuple[DataPicture, ...]:
    """Return the pictures with their paths.

    Raises:
        InputError: the folder or a picture is missing.
    """
    if not folder.is_dir():
        raise InputError(f"images {folder} is not a folder; pass the folder of the pictures")
    return tuple(dataclasses.replace(picture, path=_found(folder, picture)) for picture in pictures)


def _found(folder: pathlib.Path, picture: DataPicture) -> pathlib.Path:
    for name in picture.names:
        if os.path.isfile(folder / name):  # Path.is_file() fails on names that are too long
            return folder / name
    raise InputError(
        f"picture {picture.id} of the annotations is not in {folder}; looked for "
        f"{' and '.join(map(repr, picture.names))}; pass the right folder in --images, or use "
        "--limit"
    )
