"""Pictures: reading them strictly, and bringing them into the model frame."""

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


def load_image(
    image: ImageSource,
    *,
    convert: bool = False,
    bands: Bands | None = None,
    max_pixels: int | None = None,
) -> npt.NDArray[np.uint8]:
    """Return a picture as ``uint8 [H, W, 3] RGB``, C-contiguous, upright.

    Files are turned upright by their EXIF orientation, and so is a PIL image that is still the
    one that ``Image.open`` returned. A PIL image that was made of another one (by ``rotate``,
    ``transpose``, ``convert``, ``copy``, …) is taken as it is, whatever tag came along; a note to
    the logger ``tap_deploy`` says so if its EXIF would turn it.

    A PIL image is judged by its file where that can still be read. If it was opened from a file
    object and its pixels are loaded, Pillow has let go of the file, unless it is a PNG: whether the
    samples had more than 8 bits is then no longer known.

    Of a file with several frames the first is taken; of a PIL image the current one. An array
    that already fits is returned as it is, not copied.

    Args:
        image: a path, the bytes of a file, a binary file object (read from where it stands to
            its end, not closed), a PIL image, an array ``uint8 [H, W, 3] RGB``, or any of them
            with options of its own, as a ``PictureFile``.
        convert: turn into 8-bit RGB what is something else, instead of refusing it: greyscale,
            palette, CMYK and YCbCr pictures; transparent ones, laid on white; and those of more
            than 8 bits per channel, scaled as ``tap_deploy.pictures.scaling.scaled`` says, with a
            note to the logger ``tap_deploy``. Pixels that hold no data become white.
        bands: which bands are red, green and blue, counted from 1. They are required where a
            file has more bands than it explains.
        max_pixels: the largest file that is decoded, in pixels; None for
            ``PIL.Image.MAX_IMAGE_PIXELS``. WebP and icons are never read beyond twice that one.

    Raises:
        InputError: there is no such file, it is not a picture or is broken, it is a drawing (EPS,
            WMF, EMF), it is too large to decode safely or for the memory that is left, a side has
            less than 2 pixels, or it is not 8-bit RGB.
        MissingDependencyError: rasterio, for pictures of many bits or bands, is not installed.
    """
    options = ReadOptions(convert=convert, bands=bands, max_pixels=max_pixels)
    source, options = unpacked(image, options)
    if isinstance(source, np.ndarray):
        return rgb_from_array(source, options)
    return np.array(rgb_picture(source, options), np.uint8, order="C")


def frame_image(image: ImageSource, image_size: int) -> tuple[npt.NDArray[np.uint8], Frame]:
    """Return ``model_image(load_image(image), image_size)``, quicker for large files.

    The picture is resized where Pillow decoded it: no array of its full size is made.

    Raises:
        InputError: as the two.
        MissingDependencyError: as ``load_image``.
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
        ``uint8 [1, image_size, image_size, 3] BGR``, and the frame that maps back.

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
