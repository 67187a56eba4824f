"""Procedural textures, one function per family.

Each function draws its parameters from the generator and returns a field float32 ``[size, size]``
in 0..1, which is coloured later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Field = npt.NDArray[np.float32]  # [size, size], 0..1
Texture = Callable[[np.random.Generator, int], Field]

_GRID = 160  # pixels; sufficient resolution for the edges of leaves and cells


def ramp(rng: np.random.Generator, size: int) -> Field:
    """Return a linear gradient in a random direction."""
    along, _ = _axes(rng, size)
    return _stretched(along)


def glow(rng: np.random.Generator, size: int) -> Field:
    """Return a radial gradient around a random point."""
    x, y = _pixels(size)
    left, top = rng.uniform(0, size, 2).tolist()
    return _stretched(np.hypot(x - left, y - top))


def clouds(rng: np.random.Generator, size: int) -> Field:
    """Return smooth noise in four octaves."""
    total = np.zeros((size, size), np.float32)
    cells = int(rng.integers(2, 6))
    for octave in range(4):
        total += _smooth_noise(rng, cells << octave, size) * rng.uniform(0.4, 0.8) ** octave
    return _stretched(total)


def grain(rng: np.random.Generator, size: int) -> Field:
    """Return fine noise on an even surface, like sand or paper."""
    field = rng.standard_normal((size, size), np.float32) * rng.uniform(0.02, 0.12)
    return _clipped(0.5 + field)


def stripes(rng: np.random.Generator, size: int) -> Field:
    """Return bands in a random direction, hard or soft, straight or wavy."""
    along, across = _axes(rng, size)
    wave = rng.choice([0, 0, 4, 10]) * np.sin(across * rng.uniform(0.02, 0.08))
    bands = np.sin((along + wave) * (2 * np.pi / rng.uniform(10, 60)))
    return _hardened(bands, rng)


def checks(rng: np.random.Generator, size: int) -> Field:
    """Return a checkerboard, rotated by a random angle."""
    along, across = _axes(rng, size)
    side = rng.uniform(10, 48)
    odd = (np.floor(along / side) + np.floor(across / side)) % 2
    return _clipped(odd)


def dots(rng: np.random.Generator, size: int) -> Field:
    """Return dots on a rotated grid."""
    along, across = _axes(rng, size)
    pitch = rng.uniform(14, 48)
    distance = np.hypot(*((axis % pitch - pitch / 2) / pitch for axis in (along, across)))
    return _clipped((rng.uniform(0.18, 0.38) - distance) * pitch / 2)


def cells(rng: np.random.Generator, size: int) -> Field:
    """Return Voronoi cells of random shades."""
    x, y = _pixels(_GRID)
    centers = rng.uniform(0, _GRID, (int(rng.integers(12, 40)), 2)).astype(np.float32)
    distances = np.square(x - centers[:, 0, None, None]) + np.square(y - centers[:, 1, None, None])
    shades = rng.random(len(centers), np.float32)
    return _resized(shades[distances.argmin(axis=0)], size)


def leaves(rng: np.random.Generator, size: int) -> Field:
    """Return overlapping ellipses and boxes of random shades: edges that belong to no object."""
    field = np.full((_GRID, _GRID), rng.random(), np.float32)
    x, y = _pixels(_GRID)
    for _ in range(int(rng.integers(12, 40))):
        left, top = rng.uniform(-10, _GRID + 10, 2).tolist()
        width, height = rng.uniform(5, 35, 2).tolist()
        if rng.random() < 0.5:
            inside = np.square((x - left) / width) + np.square((y - top) / height) < 1
        else:
            inside = (abs(x - left) < width) & (abs(y - top) < height)
        field[inside] = rng.random()
    return _resized(field, size)


def plaid(rng: np.random.Generator, size: int) -> Field:
    """Return two crossed sets of bands, as in a blanket."""
    along, across = _axes(rng, size)
    total = np.zeros((size, size), np.float32)
    for axis in (along, across):
        for _ in range(2):
            total += _hardened(np.sin(axis * (2 * np.pi / rng.uniform(12, 70))), rng)
    return _clipped(total / 4)


def wood(rng: np.random.Generator, size: int) -> Field:
    """Return annual rings distorted by noise, with fibres."""
    along, across = _axes(rng, size)
    bend = _smooth_noise(rng, 4, size) * rng.uniform(10, 40)
    rings = np.sin((along + bend) * (2 * np.pi / rng.uniform(8, 24)))
    fibres = np.sin(across * 0.9 + 7 * rings) * 0.1
    return _stretched(rings * 0.4 + fibres + bend * 0.02)


def tiles(rng: np.random.Generator, size: int) -> Field:
    """Return oblong tiles of random shades with grout, every second row shifted by half."""
    along, across = _axes(rng, size)
    height = rng.uniform(12, 32)
    width, joint = height * rng.uniform(1.5, 3), rng.uniform(1, 3)
    row = np.floor(along / height).astype(np.intp)
    shifted = across + (row % 2) * width / 2
    column = np.floor(shifted / width).astype(np.intp)
    shades = rng.uniform(0.35, 1, 997).astype(np.float32)
    grout = (along % height < joint) | (shifted % width < joint)
    return _clipped(np.where(grout, 0, shades[(row * 31 + column * 17) % len(shades)]))


def ripples(rng: np.random.Generator, size: int) -> Field:
    """Return interfering circular waves from three points."""
    x, y = _pixels(size)
    total = np.zeros((size, size), np.float32)
    for _ in range(3):
        left, top = rng.uniform(-size / 2, size * 1.5, 2).tolist()
        total += np.sin(np.hypot(x - left, y - top) * (2 * np.pi / rng.uniform(16, 50)))
    return _stretched(total)


def _pixels(size: int) -> tuple[Field, Field]:
    """Return x [1, size] and y [size, 1] of the pixel centres."""
    centers = np.arange(size, dtype=np.float32) + np.float32(0.5)
    return centers[None], centers[:, None]


def _axes(rng: np.random.Generator, size: int) -> tuple[Field, Field]:
    """Return coordinates along two random orthogonal directions, pixels, each [size, size]."""
    x, y = _pixels(size)
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    phase = rng.uniform(0, 100, 2).astype(np.float32)
    return x * cos + y * sin + phase[0], y * cos - x * sin + phase[1]


def _smooth_noise(rng: np.random.Generator, cells_per_side: int, size: int) -> Field:
    return _resized(rng.random((cells_per_side, cells_per_side), np.float32), size)


def _resized(field: Field, size: int) -> Field:
    resized = Image.fromarray(field).resize((size, size), Image.Resampling.BICUBIC)
    return _clipped(np.asarray(resized))


def _stretched(field: npt.NDArray[np.floating[Any]]) -> Field:
    low, high = float(field.min()), float(field.max())
    return _clipped((field - low) / max(high - low, 1e-6))


def _hardened(waves: npt.NDArray[np.floating[Any]], rng: np.random.Generator) -> Field:
    """Map -1..1 to 0..1 with random contrast, from soft to hard edges."""
    return _clipped(waves * rng.uniform(0.5, 6) / 2 + 0.5)


def _clipped(field: npt.NDArray[np.floating[Any]]) -> Field:
    clipped: Field = np.clip(field, 0, 1).astype(np.float32, copy=False)
    return clipped
