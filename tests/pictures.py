"""Test pictures, PNG files made from chunks, and the messages for rejected pictures."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest

from tap_deploy.errors import InputError
from tap_deploy.image import load_image

HEIGHT, WIDTH = 20, 30
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # of PNG, by number of bands


def random_rgb() -> np.ndarray:
    """``uint8 [20, 30, 3]``"""
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def message_of(image: Any, **options: Any) -> str:
    """Return the message, one line, with which a picture is rejected."""
    with pytest.raises(InputError) as caught:
        load_image(image, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, bits: int, bands: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG of rows that start with their filter type; chunks stand before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, COLOUR_TYPES[bands], 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(rows))
    start = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    return start + b"".join(chunks) + pixels + png_chunk(b"IEND", b"")


def deep_png(array: np.ndarray, *chunks: bytes) -> bytes:
    """A PNG of 16 bits: ``[B, H, W]``, B bands."""
    rows = np.moveaxis(array, 0, 2).astype(">u2").reshape(array.shape[1], -1)
    content = b"".join(b"\0" + row.tobytes() for row in rows)
    return png_of(array.shape[2], array.shape[1], 16, len(array), content, *chunks)
