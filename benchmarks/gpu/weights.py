"""Weights as recipes: which entry of the synthetic state dict a tensor is, or its spread.

A graph of a published model is nearly all weights. Synthetic ones can be made again anywhere, so
only the recipe travels. Where no entry gives a tensor bit by bit (tables, int8), random numbers of
the same mean and deviation stand in: the work is the same, and so is the size of what flows.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from tap_deploy.config import TapConfig
from tap_deploy.machine.cpu import usable_cpus

SEED = 0
# Smaller ones travel as they are. So do vectors that no entry gives: scales must stay positive.
MIN_BYTES, MIN_RANDOM_BYTES = 1 << 10, 1 << 16
DTYPES = ("float32", "float16", "int8")
Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to make a tensor.

    Attributes:
        entry: of the state dict; None for random numbers.
        axes: of the entry, in the order in which the tensor has them.
        dtype: of the tensor.
        shape: of the entry, or of the random numbers.
        mean, std: of the tensor.
    """

    entry: str | None
    axes: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]
    mean: float
    std: float

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """Return what ``dataclasses.asdict`` gave."""
        lists = {name: tuple(values[name]) for name in ("axes", "shape")}
        return cls(**{**values, **lists})


class Recipes:
    """Finds recipes for the weights of a model."""

    def __init__(self, config: TapConfig) -> None:
        from tap_deploy.reference.synthetic import synthetic_state_dict

        self._state = synthetic_state_dict(config, SEED)
        self._by_range: dict[tuple[Any, ...], list[str]] = {}
        for dtype, (name, array) in itertools.product(DTYPES[:2], self._state.items()):
            key = _fingerprint(array.astype(dtype))
            self._by_range.setdefault(key, []).append(name)

    def find(self, tensor: Array) -> Recipe | None:
        """Return how to make a tensor; None if it has to travel."""
        if tensor.nbytes < MIN_BYTES or tensor.dtype.name not in DTYPES:
            return None
        mean, std = float(tensor.mean(dtype=np.float64)), float(tensor.std(dtype=np.float64))
        common = {"dtype": tensor.dtype.name, "mean": mean, "std": std}
        for name in self._by_range.get(_fingerprint(tensor), ()):
            entry = self._state[name]
            axes = _matching_axes(entry, tensor)
            if axes is not None:
                return Recipe(entry=name, axes=axes, shape=entry.shape, **common)
        if tensor.ndim < 2 or tensor.nbytes < MIN_RANDOM_BYTES:
            return None
        axes = tuple(range(tensor.ndim))
        return Recipe(entry=None, axes=axes, shape=tensor.shape, **common)


def made(recipes: Iterable[Recipe], *, reference: bool = True) -> Callable[[Recipe], bytes]:
    """Draw what recipes need, on all cores; return what gives the bytes of each.

    Args:
        recipes: that will be asked for.
        reference: whether PyTorch is there, which the reference needs; else all is random.
    """
    make = _entry if reference else _random
    names = {recipe.entry: recipe for recipe in recipes if recipe.entry is not None}
    with concurrent.futures.ThreadPoolExecutor(usable_cpus()) as pool:
        entries = dict(zip(names, pool.map(make, names.values()), strict=True))

    def bytes_of(recipe: Recipe) -> bytes:
        if recipe.entry is None:
            return _random(recipe).astype(recipe.dtype, copy=False).tobytes()
        entry = entries[recipe.entry].astype(recipe.dtype, copy=False)
        return np.ascontiguousarray(entry.transpose(recipe.axes)).tobytes()

    return bytes_of


def _entry(recipe: Recipe) -> Array:
    from tap_deploy.reference.synthetic import synthetic_array

    return synthetic_array(str(recipe.entry), recipe.shape, "float32", SEED)


def _random(recipe: Recipe) -> Array:
    seed = zlib.crc32(repr(recipe).encode())
    draw = np.random.default_rng([SEED, seed]).standard_normal(recipe.shape, np.float32)
    draw *= recipe.std
    draw += recipe.mean
    return np.clip(np.rint(draw), -127, 127) if recipe.dtype == "int8" else draw


def _fingerprint(array: Array) -> tuple[Any, ...]:
    """What does not change with the order of axes."""
    if not array.size:
        return (array.dtype.name, 0)
    return (array.dtype.name, array.size, float(array.min()), float(array.max()))


def _matching_axes(entry: Array, tensor: Array) -> tuple[int, ...] | None:
    for axes in itertools.permutations(range(entry.ndim)):
        turned = entry.transpose(axes)
        if np.array_equal(turned.astype(tensor.dtype).ravel(), tensor.ravel()):
            return axes
    return None
