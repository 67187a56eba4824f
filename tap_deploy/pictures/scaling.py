"""Scales samples of more than 8 bits to 8 bits."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tap_deploy.errors import InputError

logger = logging.getLogger(__name__)

WHITE = 255


def scaled(
    samples: npt.NDArray[Any],
    name: str,
    *,
    mode: str,
    white: int | None = None,
    no_data: npt.NDArray[np.bool_] | None = None,
    white_is_zero: bool = False,
    premultiplied: bool = False,
) -> Image.Image:
    """Return samples as a picture with 8 bits per channel, and log the scale.

    The range of integers is 0 to ``2**bits - 1``, where ``bits`` is the bit length of the largest
    sample, at least 8: 0..4095 for 12-bit samples stored in 16 bits. All colour bands share one
    scale. Floats must lie in 0..1.

    Args:
        samples: ``[B, H, W]``, integers or floats.
        name: name of the picture in messages.
        mode: mode of the B bands: ``L``, ``LA``, ``RGB``, ``RGBA`` or ``CMYK``.
        white: sample value that becomes 255, if the file states it.
        no_data: bool ``[H, W]``, pixels without data. They become white, like transparent pixels
            and pixels with a NaN.
        white_is_zero: 0 is white: invert grey values.
        premultiplied: the colours are multiplied by alpha: blend them onto white and set the
            alpha of the picture to 255.

    Returns:
        A picture in ``mode``; pixels without data are white.

    Raises:
        InputError: samples are negative, floats exceed 1, or the dtype cannot be scaled.
    """
    count = len(mode) - mode.endswith("A")
    colours, missing = _without_gaps(samples[:count], no_data)
    stated, white = white, _white(samples if premultiplied else colours, name, white)
    if premultiplied:
        colours = np.clip(colours + (white - samples[-1].astype("f8")), 0, white)
    bands = [_to_8_bits(band, white) for band in colours]
    if white_is_zero and mode[0] == "L":
        bands[0] = WHITE - bands[0]
    for band in bands:
        band[missing] = 0 if mode == "CMYK" else WHITE
    if premultiplied:
        bands.append(np.full_like(bands[0], WHITE))
    elif count < len(mode):
        bands.append(_to_8_bits(samples[-1], _white(samples[-1:], name, stated)))
    if white != WHITE or missing.any():
        note_scale(name, white, missing)
    return Image.merge(mode, [Image.fromarray(band) for band in bands])


def note_scale(name: str, white: int, missing: npt.NDArray[np.bool_] | None = None) -> None:
    """Log the sample range that is scaled to 0..255, and the share of no-data pixels.

    Args:
        name: name of the picture.
        white: sample value that became 255.
        missing: no-data pixels, bool ``[H, W]``; None if all pixels are valid.
    """
    share = 0.0 if missing is None else missing.mean()
    gaps = f"; {share:.1%} of the pixels have no data and became white" if share else ""
    logger.info("%s: samples scaled from 0..%d to 0..%d%s", name, white, WHITE, gaps)


def _without_gaps(
    colours: npt.NDArray[Any], no_data: npt.NDArray[np.bool_] | None
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    missing = np.zeros(colours.shape[1:], bool) if no_data is None else no_data
    if colours.dtype.kind == "f":
        missing = missing | ~np.isfinite(colours).all(axis=0)
    return (np.where(missing, 0, colours) if missing.any() else colours), missing


def _white(samples: npt.NDArray[Any], name: str, stated: int | None) -> int:
    lowest, highest = samples.min(), samples.max()
    if samples.dtype.kind == "f" and lowest >= 0 and highest <= 1:
        return 1
    if samples.dtype.kind not in "iu" or lowest < 0:
        found = f"samples from {lowest} to {highest}"
        raise InputError(
            f"{name} has {found} ({samples.dtype}); expected integers from 0, or floats of 0..1; "
            "scale it to 8 bits first"
        )
    if stated is not None:
        return stated
    return int(max(WHITE, (1 << int(highest).bit_length()) - 1))


def _to_8_bits(band: npt.NDArray[Any], white: int) -> npt.NDArray[np.uint8]:
    if white == WHITE:
        return band.astype(np.uint8)
    # float64 only where float32 is not exact, to limit memory: pictures may have 100 megapixels.
    real = np.multiply(band, WHITE / white, dtype="f4" if band.dtype.itemsize <= 2 else "f8")
    pixels: npt.NDArray[np.uint8] = np.clip(real + 0.5, 0, WHITE).astype(np.uint8)
    return pixels
