"""Picture sources (path, bytes, file object, PIL image, array) and the options to read them."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import stat
from collections.abc import Iterable, Iterator
from numbers import Integral
from typing import IO, Any

import numpy.typing as npt
from PIL import Image

from tap_deploy.errors import InputError

MAX_PIPE_BYTES = 1 << 28

Bands = tuple[int, int, int]  # band numbers of red, green and blue, counted from 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options for reading a picture.

    Attributes:
        convert: convert pictures that are not 8-bit RGB instead of rejecting them.
        bands: band numbers of red, green and blue, counted from 1; None to use the bands that
            the file declares.
        max_pixels: largest picture to decode, pixels; None for ``PIL.Image.MAX_IMAGE_PIXELS``.

    Raises:
        InputError: ``bands`` are not three integers >= 1, or ``max_pixels`` is not an
            integer >= 1.
    """

    convert: bool = False
    bands: Bands | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if self.bands is not None:
            bands = tuple(self.bands) if isinstance(self.bands, Iterable) else ()
            if len(bands) != 3 or not all(map(_is_count, bands)):
                raise InputError(
                    f"bands is {self.bands!r}; expected the numbers of the red, green and blue "
                    "band, counted from 1, such as (3, 2, 1)"
                )
            object.__setattr__(self, "bands", bands)
        if self.max_pixels is not None and not _is_count(self.max_pixels):
            raise InputError(
                f"max_pixels is {self.max_pixels!r}; expected an integer >= 1, or None"
            )

    @property
    def limit(self) -> int | None:
        """Largest number of pixels to decode; None without a limit."""
        return Image.MAX_IMAGE_PIXELS if self.max_pixels is None else self.max_pixels

    def check_limit(self, name: str, width: int, height: int) -> None:
        """Raise InputError if a picture of this size exceeds the limit."""
        if self.limit is not None and width * height > self.limit:
            raise InputError(
                f"{name} decodes to {width * height} pixels; expected at most {self.limit}; "
                "shrink it, or raise the limit with max_pixels= (--max-pixels) if you trust it"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PictureFile(ReadOptions):
    """A picture with its own read options; accepted by every function that takes a picture.

    Example:
        >>> scenes = (PictureFile(source=path, convert=True, bands=(4, 3, 2)) for path in paths)
        >>> for regions in predictor.predict_many(scenes, points=[[[320, 240, 1]]]): ...

    Attributes:
        source: a path, bytes, a binary file object, a PIL image or an array.
        convert: see ``load_image``.
        bands: see ``load_image``.
        max_pixels: see ``load_image``.
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
    """Return the source and options of a picture; options set on the picture take precedence."""
    if not isinstance(image, PictureFile):
        return image, options
    return image.source, ReadOptions(
        convert=image.convert or options.convert,
        bands=image.bands or options.bands,
        max_pixels=image.max_pixels or options.max_pixels,
    )


def name_of(image: object) -> str:
    """Return the name of a picture in messages: ``image 'photo.jpg'``, ``image from bytes``."""
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
    """Yield the bytes of a source as a seekable file.

    A file object is read from its current position to its end, as it may be a pipe; it stays open.

    Raises:
        InputError: the file does not exist, cannot be read or is empty, or the source has an
            unsupported type.
    """
    name = name_of(source)
    with _file(source, name) as file:
        if not file.read(1):
            raise InputError(f"{name} is empty, not a picture; expected JPEG, PNG or similar")
        file.seek(0)
        yield file


def _file(source: Any, name: str) -> IO[bytes]:
    try:
        if isinstance(source, str | os.PathLike):
            return _file_at(source)
        if isinstance(source, bytes | bytearray | memoryview):
            return io.BytesIO(source)
        if hasattr(source, "read"):
            return io.BytesIO(source.read())
    except InputError:
        raise
    except FileNotFoundError as exc:
        raise InputError(f"{name} does not exist; check the path") from exc
    except io.UnsupportedOperation as exc:
        raise InputError(f"{name} is not open for reading; open it with 'rb'") from exc
    except (OSError, ValueError) as exc:  # ValueError: a path with a NUL byte, a closed file
        raise InputError(f"{name} cannot be opened: {exc}") from exc
    except TypeError as exc:
        raise InputError(
            f"{name} returns text; expected bytes; open it in binary mode ('rb')"
        ) from exc
    raise InputError(
        f"image is of type {type(source).__name__}; expected a path, bytes, a binary file object, "
        "a PIL image or an array uint8 [H, W, 3] RGB"
    )


def _file_at(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file; a pipe, such as a shell's ``<(...)``, is read into memory.

    Raises:
        OSError: it cannot be opened, or is a device, which may have no end.
        ValueError: the path has impossible characters.
        InputError: see ``read_pipe``.
    """
    kind = os.stat(path).st_mode
    if stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
        raise OSError(errno.EINVAL, "it is a device; expected a file")
    file = open(path, "rb")  # noqa: SIM115  # returned
    if file.seekable():
        return file
    with file:
        return io.BytesIO(read_pipe(file, name_of(path)))


def read_pipe(file: IO[bytes], name: str) -> bytes:
    """Return all that comes out of a pipe.

    Raises:
        InputError: it is more than ``MAX_PIPE_BYTES``; it may have no end.
    """
    content = file.read(MAX_PIPE_BYTES + 1)
    if len(content) > MAX_PIPE_BYTES:
        raise InputError(f"{name} has more than {MAX_PIPE_BYTES} bytes; pass it as a file")
    return content


def _is_count(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 1
