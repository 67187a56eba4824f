"""The auxiliary head: what lies under each cell of the grid. It helps training, and is dropped.

Concepts reach the image embeddings only through a few tokens, and for a long time by chance.
Asking every cell for its class teaches them from the first step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F


class DenseHead(nn.Module):
    """A linear classifier on every cell of the image embeddings."""

    def __init__(self, image_embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Conv2d(image_embed_dim, num_classes + 1, 1)

    def loss(self, image_embeddings: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Cross-entropy over all cells, a scalar.

        Args:
            image_embeddings: float ``[B, C, grid, grid]``.
            classes: int64 ``[B, grid, grid]``, K is the background.
        """
        return F.cross_entropy(self.classify(image_embeddings).float(), classes)


def dense_classes(
    masks: Sequence[npt.NDArray[np.bool_]], classes: Sequence[int], grid: int, background: int
) -> npt.NDArray[np.int64]:
    """Return the class that covers most of each cell, int64 ``[grid, grid]``.

    Args:
        masks: bool [S, S] each, S a multiple of ``grid``; they do not overlap.
        classes: one a mask.
        grid: cells along a side.
        background: the class of cells that no mask covers for the most part.
    """
    if not masks:
        return np.full((grid, grid), background)
    covered = np.stack([coverage(mask, grid) for mask in masks])  # [n, grid, grid]
    shares = np.concatenate([covered, 1 - covered.sum(axis=0, keepdims=True)])
    table = np.array([*classes, background])
    found: npt.NDArray[np.int64] = table[shares.argmax(axis=0)]
    return found


def coverage(mask: npt.NDArray[np.bool_], size: int) -> npt.NDArray[np.float32]:
    """Return the part of each cell that a mask covers, float32 [size, size].

    Args:
        mask: bool [S, S], S a multiple of ``size``.
        size: cells along a side.
    """
    step = mask.shape[0] // size
    cells = mask.reshape(size, step, size, step)
    covered: npt.NDArray[np.float32] = cells.mean(axis=(1, 3), dtype=np.float32)
    return covered
