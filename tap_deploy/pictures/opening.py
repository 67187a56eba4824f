"""A file opened by Pillow, under a limit of the caller's own."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import IO, Any

from PIL import Image, ImageFile, TiffImagePlugin

from tap_deploy.errors import InputError, first_line
from tap_deploy.pictures.png_chunks import SIGNATURE as PNG
from tap_deploy.pictures.png_chunks import without_texts
from tap_deploy.pictures.source import ReadOptions

# Drawings, no rasters. Pillow starts Ghostscript for some: pictures may come from strangers.
DRAWINGS = ("EPS", "WMF")
_NOT_THIS_FORMAT = (SyntaxError, IndexError, TypeError, KeyError, EOFError, struct.error)


class UndecodedError(InputError):
    """A picture of a known format that cannot be read, such as a broken one."""


def open_picture(file: IO[bytes], name: str, options: ReadOptions) -> ImageFile.ImageFile:
    """Return a picture whose header was read, its pixels not yet.

    ``Image.open`` applies one limit to the whole process. The openers of the formats do not, so
    this calls them directly.

    Raises:
        UndecodedError: Pillow cannot read it; it may be broken.
        InputError: it is no picture, or larger than ``options`` allow.
    """
    try:
        if _prefix(file).startswith(PNG):
            file = without_texts(file)
        picture = _identified(file, name)
    except Image.DecompressionBombError as exc:
        raise InputError(beyond_pillow(name, exc)) from exc
    except (InputError, MemoryError):
        raise
    except Exception as exc:  # a broken file may raise anything
        raise InputError(f"{name} cannot be opened: {first_line(exc)}") from exc
    options.check_limit(name, picture.width, picture.height)
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        # With memory to decode into, its plugin does not ask again for the limit of the process.
        size = getattr(picture, "_tile_size", picture.size)
        picture.im = Image.new(picture.mode, size).im
    return picture


def beyond_pillow(name: str, exc: Exception) -> str:
    """Return the message about a format whose reader checks the limit of the process itself."""
    return (
        f"{name} is too large: {first_line(exc)} Pillow's own limit of 2 x "
        "PIL.Image.MAX_IMAGE_PIXELS holds for this format, whatever max_pixels is; shrink it, save "
        "it as PNG or TIFF, or raise PIL.Image.MAX_IMAGE_PIXELS in Python"
    )


def is_drawing(name: str) -> str:
    """Return the message about a picture that is made of lines, not of pixels."""
    return f"{name} is a drawing (EPS, WMF or EMF), not pixels; convert it to PNG first"


def _identified(file: IO[bytes], name: str) -> ImageFile.ImageFile:
    # Some plugins raise on less than 16 bytes.
    prefix, reason = _prefix(file).ljust(16, b"\0"), ""
    drawing = False
    for kind, factory, accept in _formats():
        accepted = accept is None or accept(prefix)
        if kind in DRAWINGS:
            drawing = drawing or bool(accepted)
        elif isinstance(accepted, str):
            reason = f": {accepted}"  # the format is known, but not built into this Pillow
        elif accepted:
            file.seek(0)
            try:
                picture: ImageFile.ImageFile = factory(file, "")
                return picture
            except _NOT_THIS_FORMAT as exc:
                if accept is not None:
                    # With a cause it is a slip of the plugin, not a message that it has.
                    is_told = isinstance(exc, SyntaxError) and exc.__cause__ is None
                    told = f": {first_line(exc)}" if is_told else ""
                    reason = f" as {kind}{told}"
    if reason:
        raise UndecodedError(
            f"{name} cannot be opened{reason}; the file may be cut short or broken"
        )
    if drawing:
        raise InputError(is_drawing(name))
    raise InputError(f"{name} is not a picture that Pillow knows; expected JPEG, PNG or the like")


def _formats() -> Iterator[tuple[str, Callable[..., Any], Callable[[bytes], Any] | None]]:
    """Yield the formats of Pillow, the usual ones first: others are loaded only if needed."""
    seen: set[str] = set()
    for load_plugins in (Image.preinit, Image.init):
        load_plugins()
        for kind in [kind for kind in Image.ID if kind not in seen]:
            seen.add(kind)
            yield kind, *Image.OPEN[kind]


def _prefix(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read(16)
