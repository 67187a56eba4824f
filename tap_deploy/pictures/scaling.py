"""Samples of more than 8 bits, brought down to 8."""

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
    """Return samples as a picture of 8 bits per channel.

    Integers are scaled from 0 to the largest number of as many bits as the largest sample has,
    at least 8: 0..4095 for 12 bits in 16. All colours of a picture share one scale. Floats have
    to lie in 0..1. A note says how they were scaled.

    Args:
        samples: ``[B, H, W]``, integers or floats.
        name: of the picture, for messages.
        mode: what the B bands are: ``L``, ``LA``, ``RGB``, ``RGBA`` or ``CMYK``.
        white: the sample that becomes 255, where the file says it.
        no_data: ``[H, W]``, pixels that hold nothing: they become white, like transparent ones.
            So do pixels with a NaN.
        white_is_zero: turn grey values around.
        premultiplied: colours have been multiplied by alpha, on its scale: they are laid on white,
            and the alpha of the picture is 255.

    Returns:
        A picture of that mode; pixels without data are white.

    Raises:
        InputError: samples are negative, or floats above 1, or of a type that cannot be scaled.
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
    """Tell the logger which samples became 0..255, and how many pixels, bool [H, W], are none."""
    share = 0.0 if missing is None else missing.mean()
    gaps = f"; {share:.1%} of the pixels hold no data: white" if share else ""
    logger.info("%s: samples of 0..%d became 0..%d%s", name, white, WHITE, gaps)


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
    # Doubles only where floats cannot hold the samples: a picture of 100 megapixels is large.
    real = np.multiply(band, WHITE / white, dtype="f4" if band.dtype.itemsize <= 2 else "f8")
    pixels: npt.NDArray[np.uint8] = np.clip(real + 0.5, 0, WHITE).astype(np.uint8)
    return pixels
