"""Recipes for weights: an entry of the synthetic state dict, or random numbers.

Weights are most of the size of a published graph. Synthetic weights can be made on any machine, so
only their recipes are copied. A tensor that is not bit-identical to an entry (tables, int8) is
replaced by random numbers of the same mean and deviation, which keeps the work and the magnitudes.
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
# Smaller tensors are copied. So are vectors without an entry, as scales must stay positive.
MIN_BYTES, MIN_RANDOM_BYTES = 1 << 10, 1 << 16
DTYPES = ("float32", "float16", "int8")
Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to make a tensor.

    Attributes:
        entry: name in the state dict; None for random numbers.
        axes: permutation of the entry's axes that gives the tensor.
        dtype: dtype of the tensor.
        shape: shape of the entry or of the random numbers.
        mean: mean of the tensor.
        std: standard deviation of the tensor.
    """

    entry: str | None
    axes: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]
    mean: float
    std: float

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """Return the recipe from the values of ``dataclasses.asdict``."""
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
        """Return the recipe of a tensor; None if it must be copied."""
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
    """Make the entries of recipes on all cores; return a function from a recipe to its bytes.

    Args:
        recipes: the recipes that will be needed.
        reference: whether PyTorch, which the reference needs, is installed; without it, all
            weights are random.
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
    """Return a key that does not depend on the order of axes."""
    if not array.size:
        return (array.dtype.name, 0)
    return (array.dtype.name, array.size, float(array.min()), float(array.max()))


def _matching_axes(entry: Array, tensor: Array) -> tuple[int, ...] | None:
    for axes in itertools.permutations(range(entry.ndim)):
        turned = entry.transpose(axes)
        if np.array_equal(turned.astype(tensor.dtype).ravel(), tensor.ravel()):
            return axes
    return None
