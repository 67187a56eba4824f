"""The auxiliary head: what lies under each cell of the grid. It helps training, and is dropped.

Names reach the image embeddings only through a few tokens, and for a long time by chance.
Asking every cell for the name of what it shows teaches them from the first step. In the same
way, asking every cell what a caption tells of its object (how large it is, and what it is left
of) teaches what captions need, and asking where in it an object ends what masks need.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from tap_deploy.config import MASK_UPSCALE
from tap_deploy.training.objective.caption_classes import CLASS_COUNTS

_CELLS_WEIGHT = 4.0  # beside the names: most cells are easy, so their mean is small


NOTHING = -100  # in place of a class: the question is not asked

_OUTLINE_MAPS = 2
_OUTLINE_WEIGHT = 2.0  # beside the names: most pixels are easy, so its mean is small
_CAPTION_WEIGHT = 0.5  # of each of its questions


class DenseHead(nn.Module):
    """Linear classifiers on every cell of the image embeddings."""

    def __init__(self, image_embed_dim: int, num_names: int) -> None:
        super().__init__()
        self.classify = nn.Conv2d(image_embed_dim, num_names + 1, 1)
        self.describe = nn.Conv2d(image_embed_dim, sum(CLASS_COUNTS), 1)
        self.outline = nn.Conv2d(image_embed_dim, _OUTLINE_MAPS * MASK_UPSCALE**2, 1)

    def loss(
        self,
        image_embeddings: torch.Tensor,
        classes: torch.Tensor,
        captions: torch.Tensor,
        outlines: torch.Tensor,
    ) -> torch.Tensor:
        """Cross-entropies over all cells and, weighted, over all low-resolution pixels, a scalar.

        Args:
            image_embeddings: float ``[B, C, grid, grid]``.
            classes: int64 ``[B, grid, grid]``, a name, or K for the background.
            captions: int64 ``[B, n, grid, grid]``, the ``caption_classes`` of the object, or
                ``NOTHING`` on the background.
            outlines: float ``[B, 2, S, S]``, see ``outline_maps``.
        """
        found = F.pixel_shuffle(self.outline(image_embeddings).float(), MASK_UPSCALE)
        outline_loss = F.binary_cross_entropy_with_logits(found, outlines)
        class_loss = F.cross_entropy(self.classify(image_embeddings).float(), classes)
        caption_loss = self._caption_loss(image_embeddings, captions)
        return class_loss + _CAPTION_WEIGHT * caption_loss + _OUTLINE_WEIGHT * outline_loss

    def _caption_loss(self, embeddings: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        """Return the sum over the questions, each a mean over the cells of objects."""
        questions = self.describe(embeddings).float().split(CLASS_COUNTS, dim=1)
        count = (captions[:, 0] != NOTHING).sum().clamp(min=1)
        losses = [
            F.cross_entropy(logits, captions[:, i], ignore_index=NOTHING, reduction="sum")
            for i, logits in enumerate(questions)
        ]
        return torch.stack(losses).sum() / count


def cell_owners(masks: Sequence[npt.NDArray[np.bool_]], grid: int) -> npt.NDArray[np.int64]:
    """Return which mask covers most of each cell, int64 ``[grid, grid]``.

    It is -1 where none covers more than is left over.

    Args:
        masks: bool [S, S] each, S a multiple of ``grid``; they do not overlap.
        grid: cells along a side.
    """
    if not masks:
        return np.full((grid, grid), -1)
    covered = np.stack([coverage(mask, grid) for mask in masks])  # [n, grid, grid]
    shares = np.concatenate([1 - covered.sum(axis=0, keepdims=True), covered])
    owners: npt.NDArray[np.int64] = shares.argmax(axis=0) - 1
    return owners


def outline_maps(masks: Sequence[npt.NDArray[np.bool_]], size: int) -> npt.NDArray[np.float32]:
    """Return where objects are and where they end, float32 ``[2, size, size]``, 0..1.

    The first map is the part of a pixel that any object covers. The second one is the part that
    is not of whatever covers most of it, be it an object or the background: it is above 0 where
    an outline runs, also one between two objects.

    Args:
        masks: bool [S, S] each, S a multiple of ``size``; they do not overlap.
        size: pixels along a side.
    """
    if not masks:
        return np.zeros((_OUTLINE_MAPS, size, size), np.float32)
    covered = np.stack([coverage(mask, size) for mask in masks])  # [n, size, size]
    objects = covered.sum(axis=0)
    mixed = 1 - np.maximum(covered.max(axis=0), 1 - objects)
    return np.stack([objects, mixed]).clip(0, 1)


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


class NeighborHead(nn.Module):
    """Linear classifiers on what the transformer of the image decoder makes for a prompt.

    Args:
        image_embed_dim: C.
        num_names: K.
    """

    def __init__(self, image_embed_dim: int, num_names: int) -> None:
        super().__init__()
        self.mark = nn.Linear(image_embed_dim, 1)
        self.name = nn.Linear(image_embed_dim, num_names + 1)

    def loss(
        self, image: torch.Tensor, tokens: torch.Tensor, cells: torch.Tensor, names: torch.Tensor
    ) -> torch.Tensor:
        """Cross-entropies over all cells, weighted, and over all names, a scalar.

        Args:
            image: float ``[P, grid * grid, C]``, the image side of the transformer.
            tokens: float ``[P, C]``, the semantic token of each region.
            cells: float ``[P, grid, grid]``, the part of each cell that the neighbour covers: 0
                everywhere if the caption names no neighbour.
            names: int64 ``[P]``, which of the names the neighbour has; K for none.
        """
        marks = self.mark(image).squeeze(2).float()  # [P, grid * grid]
        cell_loss = F.binary_cross_entropy_with_logits(marks, cells.flatten(1))
        return _CELLS_WEIGHT * cell_loss + F.cross_entropy(self.name(tokens).float(), names)
