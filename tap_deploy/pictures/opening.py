"""Opens a file with Pillow under a size limit given per call."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import IO, Any

from PIL import Image, ImageFile, TiffImagePlugin

from tap_deploy.errors import InputError, first_line
from tap_deploy.pictures.png_chunks import SIGNATURE as PNG
from tap_deploy.pictures.png_chunks import without_texts
from tap_deploy.pictures.source import ReadOptions

# Vector formats. Pillow runs Ghostscript for some of them, which is unsafe for untrusted files.
DRAWINGS = ("EPS", "WMF")
_NOT_THIS_FORMAT = (SyntaxError, IndexError, TypeError, KeyError, EOFError, struct.error)


class UndecodedError(InputError):
    """A picture of a known format cannot be decoded, for example because it is corrupt."""


def open_picture(file: IO[bytes], name: str, options: ReadOptions) -> ImageFile.ImageFile:
    """Read the header of a picture and return the picture, its pixels not yet decoded.

    ``Image.open`` applies a process-wide size limit. The format plugins do not, so this function
    calls them directly.

    Raises:
        UndecodedError: Pillow cannot read the file; it may be corrupt.
        InputError: the file is not a picture, or is larger than ``options`` allow.
    """
    try:
        if _prefix(file).startswith(PNG):
            file = without_texts(file)
        picture = _identified(file, name)
    except Image.DecompressionBombError as exc:
        raise InputError(beyond_pillow(name, exc)) from exc
    except (InputError, MemoryError):
        raise
    except Exception as exc:  # a corrupt file may raise anything
        raise InputError(f"{name} cannot be opened: {first_line(exc)}") from exc
    options.check_limit(name, picture.width, picture.height)
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        # The TIFF plugin checks the process-wide limit only when it allocates the image itself.
        size = getattr(picture, "_tile_size", picture.size)
        picture.im = Image.new(picture.mode, size).im
    return picture


def beyond_pillow(name: str, exc: Exception) -> str:
    """Return the error message for a format whose plugin enforces the process-wide limit."""
    return (
        f"{name} is too large: {first_line(exc)} For this format Pillow enforces its own limit of "
        "2 x PIL.Image.MAX_IMAGE_PIXELS, regardless of max_pixels; shrink the picture, save it as "
        "PNG or TIFF, or raise PIL.Image.MAX_IMAGE_PIXELS in Python"
    )


def is_drawing(name: str) -> str:
    """Return the error message for a vector graphic."""
    return f"{name} is a vector graphic (EPS, WMF or EMF); expected pixels; convert it to PNG first"


def _identified(file: IO[bytes], name: str) -> ImageFile.ImageFile:
    # Some plugins raise on fewer than 16 bytes.
    prefix, reason = _prefix(file).ljust(16, b"\0"), ""
    drawing = False
    for kind, factory, accept in _formats():
        accepted = accept is None or accept(prefix)
        if kind in DRAWINGS:
            drawing = drawing or bool(accepted)
        elif isinstance(accepted, str):
            reason = f": {accepted}"  # this build of Pillow lacks the codec
        elif accepted:
            file.seek(0)
            try:
                picture: ImageFile.ImageFile = factory(file, "")
                return picture
            except _NOT_THIS_FORMAT as exc:
                if accept is not None:
                    # A SyntaxError with a cause is a fault in the plugin, not its message.
                    is_told = isinstance(exc, SyntaxError) and exc.__cause__ is None
                    told = f": {first_line(exc)}" if is_told else ""
                    reason = f" as {kind}{told}"
    if reason:
        raise UndecodedError(
            f"{name} cannot be opened{reason}; the file may be truncated or corrupt"
        )
    if drawing:
        raise InputError(is_drawing(name))
    raise InputError(f"{name} is not a picture that Pillow can read; expected JPEG, PNG or similar")


def _formats() -> Iterator[tuple[str, Callable[..., Any], Callable[[bytes], Any] | None]]:
    """Yield Pillow's formats, common ones first; the other plugins are loaded only if needed."""
    seen: set[str] = set()
    for load_plugins in (Image.preinit, Image.init):
        load_plugins()
        for kind in [kind for kind in Image.ID if kind not in seen]:
            seen.add(kind)
            yield kind, *Image.OPEN[kind]


def _prefix(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read(16)
