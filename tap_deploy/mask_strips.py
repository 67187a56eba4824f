"""Mask logits at picture resolution, computed only where they can be positive."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tap_deploy.image import Frame

Floats = npt.NDArray[np.float32]

_TILE = 32  # pixels; smaller tiles mean more matrix products, larger ones mostly zero weights
_STRIP_TILES = 8  # width of a strip in tiles; the working set of a strip fits into the CPU cache


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Strip:
    """Logits of a part of the picture; outside a region's strips no logit is positive.

    Attributes:
        rows: rows of the picture, pixels.
        columns: columns of the picture, pixels.
        logits: float32 [rows, columns], or [columns, rows] with ``columns_first``.
    """

    rows: slice
    columns: slice
    logits: Floats


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Axis:
    """Both resizes and the crop along one axis; a tile of outputs reads K consecutive inputs.

    Attributes:
        size: number of outputs, pixels of the picture.
        inputs: indices of the inputs of each tile, intp [tiles, K].
        weights: interpolation weights, float32 [tiles, _TILE, K]; rows beyond ``size`` repeat the
            last one.
    """

    size: int
    inputs: npt.NDArray[np.intp]
    weights: Floats

    def pixels(self, tiles: slice) -> slice:
        """Return the output pixels of a range of tiles."""
        return slice(tiles.start * _TILE, min(tiles.stop * _TILE, self.size))

    def tiles_above_0(self, positive: npt.NDArray[np.bool_]) -> slice:
        """Return the smallest range of tiles that contains all tiles with positive outputs.

        Weights are non-negative, so only a tile with a positive input can have a positive output.

        Args:
            positive: whether an input is positive, bool [S, n].
        """
        reached = np.logical_or.reduce(positive, axis=1)
        live = np.flatnonzero(np.logical_or.reduce(reached[self.inputs], axis=1))
        return slice(int(live[0]), int(live[-1]) + 1) if len(live) else slice(0, 0)


def strips_above_0(logits: Floats, frame: Frame, *, columns_first: bool) -> Iterator[Strip]:
    """Yield the strips that can contain pixels of a region, from left to right.

    Rows are resized before columns, and sums run in the order of the inputs, independent of the
    strips. The logits therefore equal the full product ``rows @ logits @ columns.T``, except for
    BLAS rounding that depends on the matrix size.

    Args:
        logits: mask logits in the model frame, float32 [S, S].
        frame: placement of the picture in the model frame.
        columns_first: return the logits of a strip as [columns, rows].
    """
    rows, columns = _axes(frame, len(logits))
    positive = logits > 0
    for start in range(0, len(columns.inputs), _STRIP_TILES):
        across = slice(start, min(start + _STRIP_TILES, len(columns.inputs)))
        needed = slice(columns.inputs[across][0, 0], columns.inputs[across][-1, -1] + 1)
        down = rows.tiles_above_0(positive[:, needed])
        if down.stop:
            pixels = rows.pixels(down), columns.pixels(across)
            narrow = np.matmul(rows.weights[down], logits[rows.inputs[down], needed])
            narrow = narrow.reshape(-1, narrow.shape[2])[: pixels[0].stop - pixels[0].start]
            windows = narrow.T[columns.inputs[across] - needed.start]  # [tiles, K, rows]
            product = _columns_first if columns_first else _rows_first
            wide = product(windows, columns.weights[across], pixels[1].stop - pixels[1].start)
            yield Strip(rows=pixels[0], columns=pixels[1], logits=wide)


def _columns_first(windows: Floats, weights: Floats, count: int) -> Floats:
    wide: Floats = np.matmul(weights, windows)
    return wide.reshape(-1, windows.shape[2])[:count]


def _rows_first(windows: Floats, weights: Floats, count: int) -> Floats:
    tiles, _, height = windows.shape
    wide = np.empty((height, tiles, _TILE), np.float32)
    np.matmul(windows.transpose(0, 2, 1), weights.transpose(0, 2, 1), out=wide.transpose(1, 0, 2))
    return wide.reshape(height, -1)[:, :count]


@functools.lru_cache(maxsize=8)
def _axes(frame: Frame, size: int) -> tuple[_Axis, _Axis]:
    """Return the row and column resampling from logits [size, size] to the picture."""
    enlarge = _enlarge(size, frame.image_size)
    return (
        _axis(enlarge[: frame.scaled_height], frame.height),
        _axis(enlarge[: frame.scaled_width], frame.width),
    )


def _axis(enlarge: npt.NDArray[np.float64], size: int) -> _Axis:
    """Return the composition of ``enlarge`` [n, S] with a resize from n to ``size`` outputs."""
    tiles = -(-size // _TILE)
    places = np.minimum(np.arange(tiles * _TILE), size - 1).reshape(tiles, _TILE)
    left, right, weight = _taps(places, len(enlarge), size)
    used = enlarge != 0
    first = used.argmax(axis=1)[left[:, 0]]
    last = enlarge.shape[1] - 1 - used[:, ::-1].argmax(axis=1)[right[:, -1]]
    reach = np.arange((last - first).max() + 1)
    inputs = np.minimum(first, enlarge.shape[1] - len(reach))[:, None] + reach
    taken = inputs[:, None, :]  # [tiles, 1, K]
    weights = enlarge[left[..., None], taken] * (1 - weight[..., None])
    weights += enlarge[right[..., None], taken] * weight[..., None]
    return _Axis(size=size, inputs=inputs, weights=weights.astype(np.float32))


@functools.lru_cache(maxsize=1)
def _enlarge(size: int, image_size: int) -> npt.NDArray[np.float64]:
    """Return the matrix [image_size, size] that upsamples logits to the model frame."""
    left, right, weight = _taps(np.arange(image_size), size, image_size)
    matrix = np.zeros((image_size, size))
    matrix[np.arange(image_size), left] = 1 - weight
    matrix[np.arange(image_size), right] += weight
    return matrix


def _taps(
    places: npt.NDArray[np.intp], found: int, size: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Return left and right input of each output, and the weight of the right one.

    Bilinear, half-pixel centres, no antialiasing; edge pixels are repeated.
    """
    centres = ((places + 0.5) * (found / size) - 0.5).clip(0, found - 1)
    left = np.floor(centres).astype(np.intp)
    return left, np.minimum(left + 1, found - 1), centres - left
