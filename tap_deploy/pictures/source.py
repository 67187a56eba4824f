"""Where a picture comes from: a path, bytes, a file object, with the options of reading it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterable, Iterator
from numbers import Integral
from typing import IO, Any

import numpy.typing as npt
from PIL import Image

from tap_deploy.errors import InputError

Bands = tuple[int, int, int]  # which are red, green and blue, counted from 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How a picture is read.

    Attributes:
        convert: turn into 8-bit RGB what is something else, instead of refusing it.
        bands: which three bands are red, green and blue, counted from 1; None for those that
            the file says.
        max_pixels: the largest picture that is decoded; None for ``PIL.Image.MAX_IMAGE_PIXELS``.

    Raises:
        InputError: ``bands`` are not three numbers from 1, or ``max_pixels`` is not one.
    """

    convert: bool = False
    bands: Bands | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if self.bands is not None:
            bands = tuple(self.bands) if isinstance(self.bands, Iterable) else ()
            if len(bands) != 3 or not all(map(_is_count, bands)):
                raise InputError(
                    f"bands is {self.bands!r}; expected three numbers from 1, those of red, green "
                    "and blue, such as (3, 2, 1)"
                )
            object.__setattr__(self, "bands", bands)
        if self.max_pixels is not None and not _is_count(self.max_pixels):
            raise InputError(
                f"max_pixels is {self.max_pixels!r}; expected a number from 1, or None"
            )

    @property
    def limit(self) -> int | None:
        """The largest number of pixels that is decoded, None for any."""
        return Image.MAX_IMAGE_PIXELS if self.max_pixels is None else self.max_pixels

    def check_limit(self, name: str, width: int, height: int) -> None:
        """Raise InputError if a file has more pixels than may be decoded."""
        if self.limit is not None and width * height > self.limit:
            raise InputError(
                f"{name} would unpack to {width * height} pixels; expected at most {self.limit}; "
                "shrink it, or raise the limit with max_pixels= (--max-pixels) if you trust it"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PictureFile(ReadOptions):
    """A picture with the options of reading it, wherever a picture is taken.

    Example:
        >>> scenes = (PictureFile(source=path, convert=True, bands=(4, 3, 2)) for path in paths)
        >>> for regions in predictor.predict_many(scenes, points=[[[320, 240, 1]]]): ...

    Attributes:
        source: a path, bytes, a binary file object, a PIL image or an array.
        convert: see ``load_image``; so for ``bands`` and ``max_pixels``.
        bands: three numbers.
        max_pixels: a number of pixels.
    """

    source: Source


Source = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | IO[bytes]
    | Image.Image
    | npt.NDArray[Any]
)
ImageSource = Source | PictureFile


def unpacked(image: ImageSource, options: ReadOptions) -> tuple[Any, ReadOptions]:
    """Return the source and the options of a picture; its own options add to those of the call."""
    if not isinstance(image, PictureFile):
        return image, options
    return image.source, ReadOptions(
        convert=image.convert or options.convert,
        bands=image.bands or options.bands,
        max_pixels=image.max_pixels or options.max_pixels,
    )


def name_of(image: object) -> str:
    """Return what messages call a picture: ``image 'photo.jpg'``, ``image from bytes``."""
    if isinstance(image, PictureFile):
        return name_of(image.source)
    if isinstance(image, str | os.PathLike):
        return f"image {os.fspath(image)!r}"
    if isinstance(image, bytes | bytearray | memoryview):
        return "image from bytes"
    if hasattr(image, "read"):
        name = getattr(image, "name", None)
        return f"image {name!r}" if isinstance(name, str) and name else "image from a file object"
    return "image"


@contextlib.contextmanager
def opened(source: Any) -> Iterator[IO[bytes]]:
    """Yield the bytes of a source as a file that can be searched, from where the source stands.

    A file object is read to its end, as it may be a pipe, and stays open.

    Raises:
        InputError: there is no such file, it cannot be read, it is empty, or the source is
            nothing that holds a picture.
    """
    name = name_of(source)
    with _file(source, name) as file:
        if not file.read(1):
            raise InputError(f"{name} is empty, not a picture; expected JPEG, PNG or the like")
        file.seek(0)
        yield file


def _file(source: Any, name: str) -> IO[bytes]:
    try:
        if isinstance(source, str | os.PathLike):
            return _searchable(open(source, "rb"))
        if isinstance(source, bytes | bytearray | memoryview):
            return io.BytesIO(source)
        if hasattr(source, "read"):
            return io.BytesIO(source.read())
    except FileNotFoundError as exc:
        raise InputError(f"{name} does not exist; check the path") from exc
    except io.UnsupportedOperation as exc:
        raise InputError(f"{name} is not open for reading; open it with 'rb'") from exc
    except (OSError, ValueError) as exc:  # ValueError: a path with a zero byte, a closed file
        raise InputError(f"{name} cannot be opened: {exc}") from exc
    except TypeError as exc:
        raise InputError(f"{name} gives text; open it in binary mode, 'rb'") from exc
    raise InputError(
        f"image is of type {type(source).__name__}; expected a path, bytes, a binary file object, "
        "a PIL image or an array uint8 [H, W, 3] RGB"
    )


def _searchable(file: IO[bytes]) -> IO[bytes]:
    """Return a file, or what a pipe gives, such as a shell's ``<(...)``."""
    if file.seekable():
        return file
    with file:
        return io.BytesIO(file.read())


def _is_count(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 1
