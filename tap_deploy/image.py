"""Strict reading of pictures, and scaling and padding to the model frame."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
from PIL import Image

from tap_deploy.config import Preprocessing
from tap_deploy.errors import InputError
from tap_deploy.pictures.reading import rgb_from_array, rgb_picture
from tap_deploy.pictures.source import Bands, ImageSource, ReadOptions, unpacked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """Placement of a picture in the model frame, the square input of the image encoder.

    The scaled picture occupies the top left corner; the rest is padding.

    Attributes:
        height: of the original picture, pixels.
        width: of the original picture, pixels.
        scaled_height: in the model frame, pixels.
        scaled_width: in the model frame, pixels.
        scale: pixels of the model frame per pixel of the picture.
        image_size: side of the model frame, pixels.
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
            InputError: the picture is empty, or so elongated that a scaled side rounds to 0.
        """
        if height < 1 or width < 1:
            raise InputError(f"image is {width} x {height} (width x height); expected pixels")
        scale = image_size / min(height, width)
        if int(max(height, width) * scale + 0.5) > image_size:
            scale = image_size / max(height, width)
        scaled_height, scaled_width = int(height * scale + 0.5), int(width * scale + 0.5)
        if scaled_height == 0 or scaled_width == 0:
            raise InputError(
                f"image is {width} x {height} (width x height): too elongated, its short side "
                f"scales to 0 pixels in a frame of {image_size}; crop it first"
            )
        return cls(
            height=height,
            width=width,
            scaled_height=scaled_height,
            scaled_width=scaled_width,
            scale=scale,
            image_size=image_size,
        )


def load_image(
    image: ImageSource,
    *,
    convert: bool = False,
    bands: Bands | None = None,
    max_pixels: int | None = None,
) -> npt.NDArray[np.uint8]:
    """Return a picture as ``uint8 [H, W, 3] RGB``, C-contiguous, upright.

    Files, and PIL images returned directly by ``Image.open``, are rotated by their EXIF
    orientation. A PIL image derived from another one (``rotate``, ``transpose``, ``convert``,
    ``copy``, …) is used unrotated; if its EXIF asks for a rotation, the logger ``tap_deploy``
    says so.

    The bit depth of a PIL image is read from its file where possible. Pillow drops a file object
    once the pixels are loaded (except for PNG); the original bit depth is unknown then.

    Multi-frame files yield their first frame, a PIL image its current frame. An array that
    already fits is returned without a copy.

    Args:
        image: a path, the bytes of a file, a binary file object (read from its current position
            to its end, not closed), a PIL image, an array ``uint8 [H, W, 3] RGB``, or a
            ``PictureFile`` with any of them and its own options.
        convert: convert other pictures to 8-bit RGB instead of rejecting them: greyscale,
            palette, CMYK and YCbCr; transparent pictures, composited on white; and pictures of
            more than 8 bits per channel, scaled by ``tap_deploy.pictures.scaling.scaled`` with a
            message to the logger ``tap_deploy``. No-data pixels become white.
        bands: numbers from 1 of the red, green and blue bands. Required for a file with bands
            that it does not describe.
        max_pixels: size limit of a decoded file, in pixels; None for
            ``PIL.Image.MAX_IMAGE_PIXELS``. WebP and icons have a hard limit of twice that
            constant.

    Raises:
        InputError: the file does not exist, is not a picture, is corrupt, is a vector graphic
            (EPS, WMF, EMF), exceeds the size limit or the free memory, has a side of less than
            2 pixels, or is not 8-bit RGB.
        MissingDependencyError: rasterio, for pictures of many bits or bands, is not installed.
    """
    options = ReadOptions(convert=convert, bands=bands, max_pixels=max_pixels)
    source, options = unpacked(image, options)
    if isinstance(source, np.ndarray):
        return rgb_from_array(source, options)
    return np.array(rgb_picture(source, options), np.uint8, order="C")


def frame_image(image: ImageSource, image_size: int) -> tuple[npt.NDArray[np.uint8], Frame]:
    """Return ``model_image(load_image(image), image_size)``, faster for large files.

    Pillow resizes its decoded picture directly, without a full-size NumPy array.

    Raises:
        InputError: as in ``load_image`` and ``model_image``.
        MissingDependencyError: as in ``load_image``.
    """
    source, options = unpacked(image, ReadOptions())
    if isinstance(source, np.ndarray):
        return model_image(rgb_from_array(source, options), image_size)
    return _in_frame(rgb_picture(source, options), image_size)


def model_image(rgb: npt.NDArray[np.uint8], image_size: int) -> tuple[npt.NDArray[np.uint8], Frame]:
    """Scale and pad a picture for the image encoder.

    Args:
        rgb: ``uint8 [H, W, 3] RGB``, as ``load_image`` returns it.
        image_size: side of the model frame, in pixels.

    Returns:
        ``uint8 [1, image_size, image_size, 3] BGR``, and the frame for mapping back.

    Raises:
        InputError: the picture is too elongated for the frame.
    """
    return _in_frame(Image.fromarray(rgb), image_size)


def _in_frame(picture: Image.Image, image_size: int) -> tuple[npt.NDArray[np.uint8], Frame]:
    frame = Frame.for_image(picture.height, picture.width, image_size)
    size = (frame.scaled_width, frame.scaled_height)
    padded = Image.new("RGB", (image_size, image_size), Preprocessing.pad_value[::-1])
    padded.paste(picture.resize(size, Image.Resampling.BILINEAR))
    pixels = np.frombuffer(bytearray(padded.tobytes("raw", "BGR")), np.uint8)
    return pixels.reshape(1, image_size, image_size, 3), frame
