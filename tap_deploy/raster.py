"""Rasters that Pillow does not read whole: more than 8 bits per channel, or many bands."""

from __future__ import annotations

import threading
import warnings
from typing import IO, TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from tap_deploy.errors import InputError, MissingDependencyError
from tap_deploy.picture_layout import UNSIGNED, Layout, unclear_bands
from tap_deploy.picture_scaling import scaled
from tap_deploy.picture_source import ReadOptions

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

_warning_filters = threading.Lock()  # they belong to the process
_MODES = ("L", "LA", "RGB", "RGBA", "CMYK")
_STORAGE_BITS = (8, 16, 32, 64)  # files have to use one of them, whatever their samples need


def read_raster(file: IO[bytes], name: str, layout: Layout, options: ReadOptions) -> Image.Image:
    """Return a raster as 8-bit picture of the mode that its bands have, not yet turned.

    GDAL gets the bytes and the name of the format, so that no other format, no other file and
    no address is ever opened.

    Args:
        file: the raster.
        name: for messages.
        layout: what its header says.
        options: with the bands that are wanted, and the limit.

    Raises:
        InputError: it is broken or too large, lacks a band, has bands or values without a clear
            meaning.
        MissingDependencyError: rasterio is not installed.
    """
    try:
        from rasterio.errors import NotGeoreferencedWarning, RasterioError
        from rasterio.io import MemoryFile
    except ImportError as exc:
        raise MissingDependencyError(
            f"rasterio is not installed; {name} needs it, for its bits or bands: "
            'pip install "tap-deploy[raster]"'
        ) from exc
    file.seek(0)
    try:
        with MemoryFile(file.read()) as memory:
            with _warning_filters, warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                dataset = memory.open(driver=layout.driver)
            with dataset:
                return _read(dataset, name, layout, options)
    except RasterioError as exc:
        raise InputError(
            f"{name} cannot be decoded: {exc}; the file may be cut short or broken"
        ) from exc


def _read(dataset: DatasetReader, name: str, layout: Layout, options: ReadOptions) -> Image.Image:
    options.check_limit(name, dataset.width, dataset.height)
    mode, bands = "RGB", tuple(options.bands or ())
    if not bands:
        mode = layout.mode if layout.mode in _MODES else ""
        bands = tuple(range(1, len(mode) + 1))
    if not bands or max(bands) > dataset.count:
        raise InputError(unclear_bands(name, dataset.count, layout.is_deep))
    samples = dataset.read(list(bands))
    missing = None if mode.endswith("A") else _missing(dataset, bands)
    no_data: npt.NDArray[np.bool_] | None = None
    if missing is not None:
        samples[missing] = 0
        no_data = np.all(missing, axis=0)
    white = (1 << layout.bits) - 1
    return scaled(
        samples,
        name,
        mode=mode,
        white=None if layout.kind != UNSIGNED or layout.bits in _STORAGE_BITS else white,
        no_data=no_data,
        white_is_zero=layout.white_is_zero and not options.bands,
    )


def _missing(dataset: DatasetReader, bands: tuple[int, ...]) -> npt.NDArray[np.bool_] | None:
    """Return the samples that hold no data, bool [B, H, W]; None if every one does."""
    from rasterio.enums import MaskFlags

    flags = {flag for band in bands for flag in dataset.mask_flag_enums[band - 1]}
    if MaskFlags.all_valid in flags or MaskFlags.alpha in flags:
        return None
    missing: npt.NDArray[np.bool_] = dataset.read_masks(list(bands)) == 0
    return missing
