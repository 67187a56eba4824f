"""Reads rasters that Pillow cannot read in full: over 8 bits per channel, or many bands."""

from __future__ import annotations

import math
import re
from typing import IO, TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from tap_deploy.errors import InputError, MissingDependencyError, first_line
from tap_deploy.pictures.layout import BAND_MODES, UNSIGNED, Layout, no_such_band, unclear_bands
from tap_deploy.pictures.opening import UndecodedError
from tap_deploy.pictures.scaling import scaled
from tap_deploy.pictures.source import ReadOptions

if TYPE_CHECKING:
    from rasterio.io import DatasetReader, MemoryFile

_MEMORY_NAME = re.compile(r"\S*[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}[^\s:]*:? ?")
_STORAGE_BITS = (8, 16)  # storage widths below 32; they do not tell how many bits are used


def read_raster(file: IO[bytes], name: str, layout: Layout, options: ReadOptions) -> Image.Image:
    """Return a raster as an 8-bit picture in the mode of its bands; orientation is not applied.

    GDAL is given the bytes and the driver, so it opens no other format, file or URL.

    Args:
        file: the raster.
        name: name of the picture in messages.
        layout: sample layout from the header.
        options: the bands to read and the size limit.

    Raises:
        UndecodedError: the file is corrupt.
        InputError: the raster is too large, lacks a requested band, or has bands or values
            without a defined meaning.
        MissingDependencyError: rasterio is not installed.
    """
    try:
        from rasterio.io import MemoryFile
    except ImportError as exc:
        raise MissingDependencyError(
            f"rasterio is not installed; {name} needs it, for its format, bits or bands: "
            'pip install "tap-deploy[raster]"'
        ) from exc
    file.seek(0)
    try:
        with MemoryFile(file.read()) as memory, _opened(memory, layout.driver) as dataset:
            return _read(dataset, name, layout, options)
    except (InputError, MemoryError):
        raise
    except Exception as exc:  # errors of GDAL, and of rasterio on unusual headers
        raise UndecodedError(
            f"{name} cannot be decoded: {_reason(exc)}; the file may be truncated or corrupt"
        ) from exc


def _reason(error: BaseException) -> str:
    """Return GDAL's first error message, without rasterio's name of the in-memory file."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _MEMORY_NAME.sub("", first_line(error))


def _opened(memory: MemoryFile, driver: str) -> DatasetReader:
    """Open an in-memory file as a dataset, without reading its geotransform.

    rasterio warns if a file has none, and a warning filter would apply to the whole process.
    """
    from rasterio.env import ensure_env
    from rasterio.io import DatasetReader

    class Picture(DatasetReader):  # type: ignore[misc]  # rasterio has no types
        def read_transform(self) -> list[float]:
            return [0, 1, 0, 0, 0, 1]

    return ensure_env(Picture)(memory.name, driver=driver)


def _read(dataset: DatasetReader, name: str, layout: Layout, options: ReadOptions) -> Image.Image:
    _check_size(dataset, name, options)
    mode, bands = "RGB", tuple(options.bands or ())
    if not bands:
        mode = _mode(name, layout)
        bands = tuple(range(1, len(mode) + 1))
        if len(bands) > dataset.count:
            needs_convert = layout.is_deep and not options.convert
            raise InputError(unclear_bands(name, dataset.count, needs_convert))
    if max(bands) > dataset.count:
        raise InputError(no_such_band(name, dataset.count, max(bands)))
    samples = dataset.read(list(bands))
    # Without ``convert``, 8-bit samples are returned unchanged.
    has_gaps = options.convert and not mode.endswith("A")
    missing = _missing(dataset, bands) if has_gaps else None
    no_data: npt.NDArray[np.bool_] | None = None
    if missing is not None:
        samples[missing] = 0
        no_data = np.all(missing, axis=0)
    is_odd = layout.bits < 32 and layout.bits not in _STORAGE_BITS
    return scaled(
        samples,
        name,
        mode=mode,
        white=(1 << layout.bits) - 1 if layout.kind == UNSIGNED and is_odd else None,
        no_data=no_data,
        white_is_zero=layout.white_is_zero and not options.bands,
        premultiplied=layout.premultiplied and mode.endswith("A"),
    )


def _mode(name: str, layout: Layout) -> str:
    if layout.mode in BAND_MODES:
        return str(layout.mode)
    raise InputError(
        f"{name} has colour mode {layout.mode}, which is not supported in this format; "
        "expected grey, RGB or CMYK; save it as RGB first"
    )


def _check_size(dataset: DatasetReader, name: str, options: ReadOptions) -> None:
    """Raise InputError if the raster or one of its blocks exceeds the limit.

    GDAL decodes whole blocks. A tile may be larger than the picture and contain every band; 4
    samples count as one pixel.
    """
    from rasterio.enums import Interleaving

    options.check_limit(name, dataset.width, dataset.height)
    height, width = dataset.block_shapes[0]
    samples = dataset.count if dataset.interleaving == Interleaving.pixel else 1
    options.check_limit(name, width, height * math.ceil(samples / 4))


def _missing(dataset: DatasetReader, bands: tuple[int, ...]) -> npt.NDArray[np.bool_] | None:
    """Return which samples are no-data, bool [B, H, W]; None if all are valid."""
    from rasterio.enums import MaskFlags

    flags = {flag for band in bands for flag in dataset.mask_flag_enums[band - 1]}
    if MaskFlags.all_valid in flags or MaskFlags.alpha in flags:
        return None
    missing: npt.NDArray[np.bool_] = dataset.read_masks(list(bands)) == 0
    return missing
