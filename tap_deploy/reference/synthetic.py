"""Deterministic synthetic weights with the shapes and scales of a trained model.

Every tensor is drawn from a generator seeded by its name, so that any program that knows names
and shapes can rebuild the same model.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import torch

from tap_deploy.config import Preprocessing, TapConfig
from tap_deploy.errors import InputError
from tap_deploy.reference.image_encoder import relative_index
from tap_deploy.reference.model import TapModel
from tap_deploy.reference.state import dtype_name, meta_model

_EMBEDDINGS = ("point_embed", "tokens.", "tok_embeddings", "iou_token")


def synthetic_array(
    name: str, shape: tuple[int, ...], dtype: str, seed: int = 0
) -> np.ndarray[Any, Any]:
    """Return the synthetic value of one entry of a state dict.

    Args:
        name: name of the entry; it selects the distribution and seeds the generator.
        shape: shape of the result.
        dtype: NumPy dtype name of the result; numbers are drawn as float64.
        seed: additional seed.
    """
    if name == "pixel_mean":
        return np.array(Preprocessing().mean, dtype)
    if name == "pixel_rsig":
        return (1.0 / np.array(Preprocessing().std)).astype(dtype)
    if name.endswith("rel_pos_embed.index"):
        return relative_index(math.isqrt(shape[0])).numpy().astype(dtype, copy=False)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(dtype)
    return _scaled(name, np.asarray(rng.standard_normal(shape))).astype(dtype, copy=False)


def _scaled(name: str, draw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Scale normal numbers so that activations keep their size; may reuse ``draw``."""
    if name.endswith("running_mean"):
        return 0.1 * draw
    if name.endswith("coord_matrix"):
        return draw
    if name.endswith("rel_pos_embed.weight"):
        return 0.5 * draw
    if "pos_embed" in name:
        return 0.2 * draw
    if draw.ndim == 1:  # biases, and the gains of normalisation layers
        return 1 + 0.1 * draw if name.endswith("weight") else 0.05 * draw
    if any(part in name for part in _EMBEDDINGS):
        return 0.5 * draw
    # A division as in the original weights: a product would differ in the last bit.
    draw /= math.sqrt(math.prod(draw.shape[1:]))
    return draw


def synthetic_state_dict(config: TapConfig, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Return synthetic weights by name, in the dtypes of the model (float32 and int64).

    Raises:
        InputError: see ``meta_model``; or the weights do not fit into memory.
    """
    try:
        return {
            name: synthetic_array(name, tuple(entry.shape), dtype_name(entry), seed)
            for name, entry in meta_model(config).state_dict().items()
        }
    except MemoryError as exc:
        raise InputError(
            "synthetic weights of this config do not fit into memory; choose smaller sizes"
        ) from exc


def synthetic_model(config: TapConfig, seed: int = 0) -> TapModel:
    """Return a model with synthetic weights, in evaluation mode, without gradients.

    Raises:
        InputError: see ``synthetic_state_dict``.
    """
    model = meta_model(config)
    state = {k: torch.from_numpy(v) for k, v in synthetic_state_dict(config, seed).items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()
