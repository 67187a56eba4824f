"""Colour words of objects, for captions."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

# A colour has the word of its nearest sample.
_SAMPLES: dict[str, tuple[str, ...]] = {
    "red": ("d32f2f", "f44336", "b71c1c", "e53935", "ff1010", "c62828", "dd2c00", "ff4e12",
            "ff4206"),
    "orange": ("ff9800", "fb8c00", "f57c00", "ff7d20", "ef6c00", "ea7236", "dc5a28", "ff6d0a",
               "ff6612"),
    "yellow": ("ffeb3b", "fdd835", "ffca28", "fff176", "ffee58", "e8d020", "fcc21b", "ffba06"),
    "green": ("4caf50", "388e3c", "1b5e20", "8bc34a", "aed581", "00c853", "689f38", "b2d732",
              "33691e", "9ccc65", "00e676", "2e5d1e", "54702a", "6a8a30"),
    "blue": ("2196f3", "1976d2", "0d47a1", "64b5f6", "42a5f5", "81d4fa", "29b6f6", "2962ff",
             "1a237e", "0288d1", "4fc3f7", "1530e0", "b3e5fc", "1e3c78", "0a10c8"),
    "purple": ("9c27b0", "7b1fa2", "4a148c", "673ab7", "ab47bc", "9575cd", "6a1b9a", "ba68c8",
               "8e24aa", "aa00ff", "d050ff", "7a3fe0"),
    "pink": ("f06292", "ec407a", "f48fb1", "f8bbd0", "ff40a0", "ff80ab", "ff4fa8", "fc9ac8"),
    "brown": ("795548", "5d4037", "8d6e63", "6d4c41", "a1622d", "8b4513", "543930", "99643c",
              "ba7e42", "b87333", "a67c52"),
    "black": ("000000", "101010", "212121", "333333", "2b3a42", "3c3c3c"),
    "gray": ("757575", "9e9e9e", "616161", "90a4ae", "78909c", "b0b0b0", "607d8b", "858585"),
    "white": ("ffffff", "f5f5f5", "fafafa", "eceff1", "eeeeee", "e8e8e8"),
}  # fmt: skip
_NO_WORD = (  # turquoise, olive, tan, peach, salmon, crimson, lilac, indigo: people disagree
    "00e5d0", "1de9b6", "00bfa5", "26c6da", "2a7e8a", "00838f", "004d40", "80cbc4", "40e0ff",
    "6aa5b2", "808000", "9e9d24", "827717", "d4e157", "c6ff00", "ffe0b2", "f5deb3", "ffccbc",
    "f6ae42", "f6a25a", "ffae5a", "d2a679", "e57373", "ef9a9a", "ff8a65", "ff665a", "ad1457",
    "9a2f20", "e5533a", "ff5b12", "c2185b", "880e4f", "e000a0", "e1bee7", "c5b3f0", "5030e0",
    "3f30c0", "5c6bc0", "6a5cff", "2a1a66", "455a64",
)  # fmt: skip

COLOR_WORDS: tuple[str, ...] = tuple(_SAMPLES)
_LEVELS = 32  # levels per channel in the table; a difference of 8 of 256 values does not matter
_CLEAR = 0.75  # maximum ratio of the distance to the nearest word and to the second nearest
_UNCLEAR = len(COLOR_WORDS)
_CONES_FROM_RGB = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_OKLAB_FROM_CONES = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def color_shares(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Return the fraction of pixels that clearly have each colour.

    Args:
        pixels: at least one pixel, RGB uint8 [n, 3].

    Returns:
        Fractions in the order of ``COLOR_WORDS``, float64 [11]. Pixels between two words count for
        none, so the sum is at most 1.
    """
    steps = pixels.astype(np.intp) * _LEVELS // 256
    words = _table()[steps[:, 0], steps[:, 1], steps[:, 2]]
    counts = np.bincount(words, minlength=_UNCLEAR + 1)[:_UNCLEAR]
    shares: npt.NDArray[np.float64] = counts / len(pixels)
    return shares


@functools.cache
def _table() -> npt.NDArray[np.uint8]:
    """Return the index of the word for every colour, uint8 [32, 32, 32]; 11 if unclear."""
    centers = (np.arange(_LEVELS) + 0.5) / _LEVELS
    colors = np.stack(np.meshgrid(centers, centers, centers, indexing="ij"), axis=-1)
    flat = _oklab_from_rgb(colors.reshape(-1, 3))
    groups = (*_SAMPLES.values(), _NO_WORD)
    distances = np.empty((len(groups), len(flat)))
    for row, samples in zip(distances, groups, strict=True):
        rgb = np.array([list(bytes.fromhex(sample)) for sample in samples]) / 255
        difference = flat[:, None] - _oklab_from_rgb(rgb)[None]  # [32768, samples, 3]
        row[:] = np.linalg.norm(difference, axis=-1).min(axis=1)
    nearest, second = np.sort(distances, axis=0)[:2]
    words = np.where(nearest <= _CLEAR * second, distances.argmin(axis=0), _UNCLEAR)
    return words.astype(np.uint8).reshape((_LEVELS,) * 3)


def _oklab_from_rgb(rgb: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Convert sRGB 0..1 [n, 3] to Oklab, in which distances match perceived differences.

    The matrices are from https://bottosson.github.io/posts/oklab/.
    """
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    cones = linear @ _CONES_FROM_RGB.T
    oklab: npt.NDArray[np.float64] = np.cbrt(cones) @ _OKLAB_FROM_CONES.T
    return oklab
