"""Pictures: reading them strictly, and bringing them into the model frame."""

from __future__ import annotations

import dataclasses
import os
import threading
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from tap_deploy.config import Preprocessing
from tap_deploy.errors import InputError

ImageSource = str | os.PathLike[str] | Image.Image | npt.NDArray[Any]

MIN_SIDE = 2  # pixels

_MODE_NAMES = {
    "1": "black and white",
    "L": "greyscale",
    "LA": "greyscale with alpha",
    "La": "greyscale with alpha",
    "P": "a palette picture",
    "PA": "a palette picture with alpha",
    "RGB": "RGB with a transparent colour",
    "RGBA": "RGB with alpha",
    "RGBa": "RGB with alpha",
    "CMYK": "CMYK",
}
_ARRAY_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # by number of channels
_CONVERT_HINT = "expected 8-bit RGB; convert it first, or pass convert=True (--convert)"
_warning_filters = threading.Lock()  # they belong to the process; see _open


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """Where a picture lies in the square that the image encoder sees.

    The picture is scaled by ``scale`` to ``scaled_height`` x ``scaled_width`` and stands in
    the left top corner of ``image_size`` x ``image_size``; the rest is padding. All in pixels.
    """

    height: int
    width: int
    scaled_height: int
    scaled_width: int
    scale: float
    image_size: int

    @classmethod
    def for_image(cls, height: int, width: int, image_size: int) -> Frame:
        """Return the frame of a picture of ``height`` x ``width`` pixels.

        Raises:
            InputError: the picture is empty, or so elongated that a scaled side would be 0.
        """
        if height < 1 or width < 1:
            raise InputError(f"image is {width} x {height} (width x height); expected pixels")
        scale = image_size / min(height, width)
        if int(max(height, width) * scale + 0.5) > image_size:
            scale = image_size / max(height, width)
        scaled_height, scaled_width = int(height * scale + 0.5), int(width * scale + 0.5)
        if scaled_height == 0 or scaled_width == 0:
            raise InputError(
                f"image is {width} x {height} (width x height): too elongated, nothing would be "
                f"left of its short side in a frame of {image_size} pixels; crop it first"
            )
        return cls(
            height=height,
            width=width,
            scaled_height=scaled_height,
            scaled_width=scaled_width,
            scale=scale,
            image_size=image_size,
        )


def load_image(image: ImageSource, *, convert: bool = False) -> npt.NDArray[np.uint8]:
    """Return a picture as ``uint8 [H, W, 3] RGB``, C-contiguous, EXIF orientation applied.

    Of a file with several frames the first is taken; of a PIL image the current one. An array
    that already fits is returned as it is, not copied.

    Args:
        image: a path, a PIL image, or an array ``uint8 [H, W, 3] RGB``.
        convert: turn greyscale, palette, CMYK and YCbCr pictures into RGB, and lay transparent
            ones on white, instead of refusing them. Pictures of more than 8 bits per channel
            are refused all the same: only their owner knows how to scale them.

    Raises:
        InputError: there is no such file, it is not a picture or is broken, it is too large to
            decode safely, a side has less than 2 pixels, or it is not 8-bit RGB.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image, convert)
    return np.array(_picture(image, convert), np.uint8, order="C")


def frame_image(image: ImageSource, image_size: int) -> tuple[npt.NDArray[np.uint8], Frame]:
    """Return ``model_image(load_image(image), image_size)``, in half the time for large files.

    The picture is resized where Pillow decoded it: no array of its full size is made.

    Raises:
        InputError: as the two.
    """
    if isinstance(image, np.ndarray):
        return model_image(_from_array(image, False), image_size)
    return _in_frame(_picture(image, False), image_size, Preprocessing.pad_value)


def model_image(
    rgb: npt.NDArray[np.uint8],
    image_size: int,
    pad_value: tuple[int, int, int] = Preprocessing.pad_value,
) -> tuple[npt.NDArray[np.uint8], Frame]:
    """Scale and pad a picture for the image encoder.

    Args:
        rgb: ``uint8 [H, W, 3] RGB``, as ``load_image`` returns it.
        image_size: side of the model frame, in pixels.
        pad_value: BGR colour of the padding, 0..255.

    Returns:
        ``uint8 [1, image_size, image_size, 3] BGR``, and the frame that maps back.

    Raises:
        InputError: the picture is too elongated for the frame.
    """
    return _in_frame(Image.fromarray(rgb), image_size, pad_value)


def _in_frame(
    picture: Image.Image, image_size: int, pad_value: tuple[int, int, int]
) -> tuple[npt.NDArray[np.uint8], Frame]:
    frame = Frame.for_image(picture.height, picture.width, image_size)
    size = (frame.scaled_width, frame.scaled_height)
    padded = Image.new("RGB", (image_size, image_size), pad_value[::-1])
    padded.paste(picture.resize(size, Image.Resampling.BILINEAR))
    pixels = np.frombuffer(bytearray(padded.tobytes("raw", "BGR")), np.uint8)
    return pixels.reshape(1, image_size, image_size, 3), frame


def _picture(image: Any, convert: bool) -> Image.Image:
    """Return a path or PIL image decoded, upright, mode RGB; a PIL image that fits as it is."""
    if isinstance(image, Image.Image):
        return _decoded(image, "image", convert)
    if isinstance(image, (str, os.PathLike)):
        return _from_file(image, convert)
    raise InputError(
        f"image is of type {type(image).__name__}; expected a path, a PIL image or an array "
        "uint8 [H, W, 3] RGB"
    )


def _from_file(path: str | os.PathLike[str], convert: bool) -> Image.Image:
    name = f"image {os.fspath(path)!r}"
    try:
        picture = _open(path)
    except FileNotFoundError as exc:
        raise InputError(f"{name} does not exist; check the path") from exc
    except UnidentifiedImageError as exc:
        raise InputError(
            f"{name} is not a picture that Pillow knows; expected JPEG, PNG, WebP or the like"
        ) from exc
    except Image.DecompressionBombError as exc:
        raise InputError(_too_large(name, "far more pixels than are safe")) from exc
    except Exception as exc:  # a broken file may raise anything, see _decoded
        raise InputError(f"{name} cannot be opened: {_one_line(exc)}") from exc
    with picture:
        num_pixels, limit = picture.width * picture.height, Image.MAX_IMAGE_PIXELS
        if limit is not None and num_pixels > limit:
            raise InputError(_too_large(name, f"{num_pixels} pixels"))
        return _decoded(picture, name, convert)


def _open(path: str | os.PathLike[str]) -> Image.Image:
    """Read the header, without the warning that Pillow prints where this module refuses."""
    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path)


def _too_large(name: str, found: str) -> str:
    return (
        f"{name} would unpack to {found}; expected at most {Image.MAX_IMAGE_PIXELS}; shrink it, "
        "or raise PIL.Image.MAX_IMAGE_PIXELS in Python if you trust it"
    )


def _decoded(picture: Image.Image, name: str, convert: bool) -> Image.Image:
    _check_size(name, picture.height, picture.width)
    _check_depth(name, picture)
    if not convert and (picture.mode != "RGB" or picture.has_transparency_data):
        kind = _MODE_NAMES.get(picture.mode, "not RGB")
        raise InputError(f"{name} is {kind} (mode {picture.mode}); {_CONVERT_HINT}")
    try:
        picture.load()
        return _rgb(_upright(picture))
    except Exception as exc:  # Pillow's decoders raise ten kinds of errors on broken files
        raise InputError(
            f"{name} cannot be decoded: {_one_line(exc)}; the file may be cut short or broken"
        ) from exc


def _upright(picture: Image.Image) -> Image.Image:
    try:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(picture) if turned else picture
    except Exception:  # broken EXIF data say nothing about the orientation; the pixels are fine
        return picture


def _rgb(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    if picture.mode == "La":
        picture = picture.convert("LA")
    rgba = picture.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _from_array(array: npt.NDArray[Any], convert: bool) -> npt.NDArray[np.uint8]:
    shape = list(array.shape)
    if array.size == 0:
        raise InputError(f"image is an empty array {shape}; expected uint8 [H, W, 3] RGB")
    if array.dtype != np.uint8:
        raise InputError(
            f"image is a {array.dtype} array; expected uint8 [H, W, 3] RGB; scale it to 0..255 "
            "and call .astype('uint8') first"
        )
    channels = 1 if array.ndim == 2 else shape[-1] if array.ndim == 3 else 0
    if channels not in _ARRAY_MODES:
        hint = (
            "; transpose it with .transpose(1, 2, 0)" if array.ndim == 3 and shape[0] == 3 else ""
        )
        raise InputError(f"image is an array {shape}; expected uint8 [H, W, 3] RGB{hint}")
    _check_size("image", shape[0], shape[1])
    mode = _ARRAY_MODES[channels]
    if mode == "RGB":
        return np.ascontiguousarray(array)
    if not convert:
        raise InputError(f"image is {_MODE_NAMES[mode]}, an array {shape}; {_CONVERT_HINT}")
    flat = np.ascontiguousarray(array[..., 0] if shape[2:] == [1] else array)
    return np.array(_rgb(Image.fromarray(flat)), np.uint8, order="C")


def _check_size(name: str, height: int, width: int) -> None:
    if height < MIN_SIDE or width < MIN_SIDE:
        raise InputError(
            f"{name} is {width} x {height} (width x height); expected at least "
            f"{MIN_SIDE} x {MIN_SIDE} pixels"
        )


def _check_depth(name: str, picture: Image.Image) -> None:
    # Pillow cuts 16-bit RGB files down to mode RGB on reading; only the tile still tells.
    raw_modes = [str(tile[3]) for tile in getattr(picture, "tile", [])]
    if picture.mode[0] in "IF" or any(";16" in raw_mode for raw_mode in raw_modes):
        raise InputError(
            f"{name} has more than 8 bits per channel (mode {picture.mode}); expected 8-bit RGB; "
            "scale it to 0..255 and save it with 8 bits first"
        )


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__
