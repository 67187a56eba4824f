"""Decodes a picture from any source to upright 8-bit RGB."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import IO, Any, TypeGuard

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile

from tap_deploy.errors import InputError, MissingDependencyError, first_line
from tap_deploy.pictures.layout import (
    BAND_MODES,
    NOBODY,
    RASTERIO,
    Layout,
    layout_of,
    no_such_band,
    tiff_layout,
    unclear_bands,
)
from tap_deploy.pictures.opening import (
    DRAWINGS,
    UndecodedError,
    beyond_pillow,
    is_drawing,
    open_picture,
)
from tap_deploy.pictures.raster import read_raster
from tap_deploy.pictures.scaling import WHITE, note_scale, scaled
from tap_deploy.pictures.source import Bands, ReadOptions, name_of, opened

MIN_SIDE = 2  # pixels

logger = logging.getLogger(__name__)

_DEEP = ("I", "F")  # first letters of Pillow's modes of more than 8 bits
_CLOSED = (
    "image is a PIL image whose file was closed before its pixels were read; pass the path, or "
    "load() it first"
)
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
_TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_CONVERT_HINT = "expected 8-bit RGB; convert it first, or pass convert=True (--convert)"
_FULL_SCALE = 65535  # Pillow scales the grey values of a PPM to this maximum
_MAX_ROWS = 32  # an array with at most this many rows probably has its bands first


def rgb_picture(source: Any, options: ReadOptions) -> Image.Image:
    """Return a picture decoded, upright, in mode RGB; an RGB PIL image is returned unchanged.

    Raises:
        InputError: see ``tap_deploy.image.load_image``.
        MissingDependencyError: the picture needs rasterio, which is not installed.
    """
    name = name_of(source)
    try:
        if isinstance(source, Image.Image):
            return _from_pillow(source, options)
        with opened(source) as file:
            return _from_file(file, name, options)
    except MemoryError as exc:
        raise InputError(
            f"{name} needs more memory than is free; shrink it, or read fewer pictures at a time"
        ) from exc


def rgb_from_array(array: npt.NDArray[Any], options: ReadOptions) -> npt.NDArray[np.uint8]:
    """Return an array as C-contiguous ``uint8 [H, W, 3] RGB``; without a copy if it is one.

    Raises:
        InputError: see ``tap_deploy.image.load_image``.
    """
    shape = list(array.shape)
    if array.size == 0:
        raise InputError(f"image is an empty array {shape}; expected uint8 [H, W, 3] RGB")
    if array.dtype != np.uint8 and not options.convert:
        raise InputError(
            f"image is a {array.dtype} array; expected uint8 [H, W, 3] RGB; scale it to 0..255 "
            "and call .astype('uint8') first, or pass convert=True"
        )
    samples = array[..., None] if array.ndim == 2 else array
    if samples.ndim == 3 and options.bands:
        _check_bands_last(shape)
        samples = samples[..., _places(options.bands, samples.shape[2], "image")]
    mode = _ARRAY_MODES.get(samples.shape[2] if samples.ndim == 3 else 0)
    if mode is None:
        is_planar = array.ndim == 3 and shape[0] == 3
        hint = "; transpose it with .transpose(1, 2, 0)" if is_planar else ""
        raise InputError(f"image is an array {shape}; expected uint8 [H, W, 3] RGB{hint}")
    _check_size("image", shape[0], shape[1])
    if mode == "RGB" and array.dtype == np.uint8:
        return np.ascontiguousarray(samples)
    if not options.convert:
        raise InputError(f"image is {_MODE_NAMES[mode]}, an array {shape}; {_CONVERT_HINT}")
    picture = scaled(np.moveaxis(samples, 2, 0), "image", mode=mode)
    return np.array(_rgb(picture), np.uint8, order="C")


def _check_bands_last(shape: list[int]) -> None:
    """Raise InputError if an array looks like [bands, H, W], the layout of raster libraries."""
    if len(shape) == 3 and shape[0] <= _MAX_ROWS and shape[0] < shape[2]:
        raise InputError(
            f"image is an array {shape}: {shape[0]} rows and {shape[2]} bands; expected "
            "[H, W, bands]; transpose it with .transpose(1, 2, 0), or, if the shape is intended, "
            "pass only the three bands"
        )


def _from_file(file: IO[bytes], name: str, options: ReadOptions) -> Image.Image:
    layout = layout_of(file)
    _check_layout(name, layout, options)
    if _needs_raster(layout):
        return _from_raster(file, name, layout, options)
    try:
        return _decoded(open_picture(file, name, options), name, layout, options)
    except UndecodedError as exc:
        if layout is None or layout.reader != RASTERIO:
            raise
        if options.bands is None and layout.mode not in BAND_MODES:
            raise
        return _from_raster_instead(file, name, layout, options, exc)


def _from_raster_instead(
    file: IO[bytes], name: str, layout: Layout, options: ReadOptions, reason: UndecodedError
) -> Image.Image:
    """Read an 8-bit file with rasterio after Pillow failed to decode it."""
    try:
        return _from_raster(file, name, layout, options)
    except MissingDependencyError as exc:
        raise InputError(
            f'{reason}; if it is intact, rasterio may read it: pip install "tap-deploy[raster]"'
        ) from exc
    except UndecodedError:
        raise reason from None


def _from_pillow(picture: Image.Image, options: ReadOptions) -> Image.Image:
    """Return a PIL image as RGB; EXIF orientation is applied only to the result of ``Image.open``.

    An image derived from it may keep the EXIF data although its pixels are already upright.
    """
    if not isinstance(picture, ImageFile.ImageFile):
        if picture.info and _orientation(picture) in _TURNS:
            logger.info("image: EXIF orientation not applied; the pixels may be upright already")
        return _decoded(picture, "image", None, options, turn=False)
    _check_open(picture)
    with _file_of(picture) as file:
        layout = layout_of(file) if file is not None else None
        if hasattr(picture, "tag_v2"):
            layout = tiff_layout(picture.tag_v2)  # of the current frame
        _check_layout("image", layout, options)
        if _needs_raster(layout):
            if file is None or not picture.tile or picture.tell() != 0:
                raise InputError(
                    "image is a PIL image that lacks data of its file; pass the file itself"
                )
            return _from_raster(file, "image", layout_of(file) or layout, options)
    try:
        return _decoded(picture, "image", layout, options)
    except UndecodedError as exc:
        if layout is None or layout.reader != RASTERIO:
            raise
        raise InputError(f"{exc}; if it is intact, pass the file itself") from exc


def _check_open(picture: ImageFile.ImageFile) -> None:
    """Raise InputError if the pixels cannot be loaded, or only with an external program."""
    if not picture.tile:
        return
    if picture.format in DRAWINGS:
        raise InputError(is_drawing("image"))
    if not _is_open(picture.fp):
        raise InputError(_CLOSED)


def _is_open(file: Any) -> bool:
    try:
        return file is not None and not getattr(file, "closed", False)
    except ValueError:  # Pillow's placeholder for a closed file
        return False


@contextlib.contextmanager
def _file_of(picture: ImageFile.ImageFile) -> Iterator[IO[bytes] | None]:
    """Yield the file of a PIL image, None if it is gone; restore the file position afterwards."""
    # After loading, PngImageFile keeps its file in _fp.
    file = picture.fp if picture.tile else vars(picture).get("_fp")
    if file is not None and _is_open(file):
        position = file.tell()
        try:
            yield file
        finally:
            file.seek(position)
        return
    try:
        again = open(picture.filename, "rb")  # noqa: SIM115  # closed below
    except OSError:  # no file name, or the file was deleted
        yield None
        return
    with again:
        yield again


def _check_layout(name: str, layout: Layout | None, options: ReadOptions) -> None:
    """Raise InputError if the samples cannot be read with these options."""
    if layout is None:
        return
    if layout.mode is None and options.bands is None:
        needs_convert = layout.is_deep and not options.convert
        raise InputError(unclear_bands(name, layout.bands, needs_convert))
    if layout.is_deep and not options.convert:
        raise InputError(f"{name} has {layout.bits} bits per channel; {_CONVERT_HINT}")
    if layout.is_deep and layout.reader == NOBODY:
        raise InputError(
            f"{name} has {layout.bits} bits per channel; expected 8 bits, the only depth supported "
            "for this format; save it as PNG or TIFF first"
        )


def _needs_raster(layout: Layout | None) -> TypeGuard[Layout]:
    if layout is None or layout.reader != RASTERIO:
        return False
    return layout.is_deep or layout.mode is None or not layout.pillow_reads


def _from_raster(file: IO[bytes], name: str, layout: Layout, options: ReadOptions) -> Image.Image:
    picture = read_raster(file, name, layout, options)
    _check_mode(picture, name, options)
    _check_size(name, picture.height, picture.width)
    orientation = layout.orientation
    if layout.driver == "PNG":
        orientation = _orientation(open_picture(file, name, options))
    return _rgb(_turned(picture, orientation))


def _decoded(
    picture: Image.Image,
    name: str,
    layout: Layout | None,
    options: ReadOptions,
    *,
    turn: bool = True,
) -> Image.Image:
    _check_size(name, picture.height, picture.width)
    _check_mode(picture, name, options)
    try:
        picture.load()
        picture = _turned(picture, _orientation(picture)) if turn else picture
        if picture.mode[0] in _DEEP:
            picture = _scaled_grey(picture, name, layout)
        elif layout is not None and layout.is_deep:  # Pillow has scaled it on decoding
            note_scale(name, layout.white or (1 << layout.bits) - 1)
        if options.bands is not None:
            picture = _chosen(picture, name, options.bands)
        rgb = _rgb(picture)
        gaps = _gaps(picture, layout) if options.convert else None
        return rgb if gaps is None else _filled(rgb, gaps, name)
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError as exc:
        raise InputError(beyond_pillow(name, exc)) from exc
    except Exception as exc:  # Pillow's decoders raise many types of errors on corrupt files
        # Some plugins hold a file of their own, which ``_check_open`` does not see.
        if isinstance(exc, ValueError) and "closed" in str(exc):
            raise InputError(_CLOSED) from exc
        raise UndecodedError(
            f"{name} cannot be decoded: {first_line(exc)}; the file may be truncated or corrupt"
        ) from exc


def _check_mode(picture: Image.Image, name: str, options: ReadOptions) -> None:
    if picture.mode[0] in _DEEP and not options.convert:
        raise InputError(f"{name} has more than 8 bits per channel; {_CONVERT_HINT}")
    if not (options.convert or options.bands) and (
        picture.mode != "RGB" or picture.has_transparency_data
    ):
        kind = _MODE_NAMES.get(picture.mode, "not RGB")
        raise InputError(f"{name} is {kind} (mode {picture.mode}); {_CONVERT_HINT}")


def _orientation(picture: Image.Image) -> Any:
    """Return the EXIF orientation; 1 (upright) if the EXIF data are corrupt."""
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's EXIF and XMP parsers raise anything
        return 1


def _turned(picture: Image.Image, orientation: Any) -> Image.Image:
    turn = _TURNS.get(orientation)
    return picture if turn is None else picture.transpose(turn)


def _scaled_grey(picture: Image.Image, name: str, layout: Layout | None) -> Image.Image:
    grey = np.asarray(picture)
    transparent = picture.info.get("transparency")
    white = _FULL_SCALE if picture.format == "PPM" and picture.mode == "I" else None
    if white is not None and layout is not None and layout.white is not None:
        white = layout.white
        grey = np.rint(grey * (white / _FULL_SCALE)).astype(grey.dtype)  # undo Pillow's scaling
    return scaled(
        grey[None],
        name,
        mode="L",
        white=white,
        no_data=grey == transparent if isinstance(transparent, int) else None,
    )


def _chosen(picture: Image.Image, name: str, bands: Bands) -> Image.Image:
    if picture.mode not in BAND_MODES:
        kind = _MODE_NAMES.get(picture.mode, "not RGB")
        raise InputError(
            f"{name} is {kind} (mode {picture.mode}), whose bands are not colour channels; leave "
            "out bands (--bands)"
        )
    channels = picture.split()
    return Image.merge("RGB", [channels[place] for place in _places(bands, len(channels), name)])


def _places(bands: Bands, count: int, name: str) -> list[int]:
    if max(bands) > count:
        raise InputError(no_such_band(name, count, max(bands)))
    return [band - 1 for band in bands]


def _gaps(picture: Image.Image, layout: Layout | None) -> npt.NDArray[np.bool_] | None:
    """Return the no-data pixels of an 8-bit picture, bool [H, W]; None if there are none."""
    if layout is None or layout.no_data is None or picture.has_transparency_data:
        return None
    no_data = WHITE - layout.no_data if layout.white_is_zero else layout.no_data
    samples = np.atleast_3d(np.asarray(picture))
    missing: npt.NDArray[np.bool_] = np.all(samples == no_data, axis=2)
    return missing if missing.any() else None


def _filled(rgb: Image.Image, gaps: npt.NDArray[np.bool_], name: str) -> Image.Image:
    note_scale(name, WHITE, gaps)
    pixels = np.array(rgb)
    pixels[gaps] = WHITE
    return Image.fromarray(pixels)


def _rgb(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    if picture.mode == "La":
        picture = picture.convert("LA")
    rgba = picture.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _check_size(name: str, height: int, width: int) -> None:
    if height < MIN_SIDE or width < MIN_SIDE:
        raise InputError(
            f"{name} is {width} x {height} (width x height); expected at least "
            f"{MIN_SIDE} x {MIN_SIDE} pixels"
        )
