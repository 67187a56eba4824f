"""Auxiliary heads, which speed up training and are dropped afterwards.

Without them, gradients of names reach the image embeddings only through a few tokens, and names
are learned late. Classifying every grid cell by the name of its object supervises the embeddings
from the first step. In the same way, predicting the parts of the caption (such as size or
neighbour) per cell helps captions, and predicting outlines per cell helps masks.
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

_CELLS_WEIGHT = 4.0  # relative to names: most cells are easy, so the mean is small


NOTHING = -100  # class of cells that are ignored

_OUTLINE_MAPS = 2
_OUTLINE_WEIGHT = 2.0  # relative to names: most pixels are easy, so the mean is small
_CAPTION_WEIGHT = 0.5  # relative to names, per class


class DenseHead(nn.Module):
    """Linear classifiers of names, caption parts and outlines on every cell of the embeddings."""

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
        """Return the weighted sum of the cross-entropies of the three classifiers, a scalar.

        Args:
            image_embeddings: float ``[B, C, grid, grid]``.
            classes: index of a name, or K for the background, int64 ``[B, grid, grid]``.
            captions: ``caption_classes`` of the object, or ``NOTHING`` for the background, int64
                ``[B, n, grid, grid]``.
            outlines: see ``outline_maps``, float ``[B, 2, S, S]``.
        """
        found = F.pixel_shuffle(self.outline(image_embeddings).float(), MASK_UPSCALE)
        outline_loss = F.binary_cross_entropy_with_logits(found, outlines)
        class_loss = F.cross_entropy(self.classify(image_embeddings).float(), classes)
        caption_loss = self._caption_loss(image_embeddings, captions)
        return class_loss + _CAPTION_WEIGHT * caption_loss + _OUTLINE_WEIGHT * outline_loss

    def _caption_loss(self, embeddings: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        """Return the sum over the caption classes, each a mean over the cells with objects."""
        questions = self.describe(embeddings).float().split(CLASS_COUNTS, dim=1)
        count = (captions[:, 0] != NOTHING).sum().clamp(min=1)
        losses = [
            F.cross_entropy(logits, captions[:, i], ignore_index=NOTHING, reduction="sum")
            for i, logits in enumerate(questions)
        ]
        return torch.stack(losses).sum() / count


def cell_owners(masks: Sequence[npt.NDArray[np.bool_]], grid: int) -> npt.NDArray[np.int64]:
    """Return the index of the mask that covers most of each cell, int64 ``[grid, grid]``.

    It is -1 where no mask covers more than the background.

    Args:
        masks: masks that do not overlap, bool [S, S] each; S is a multiple of ``grid``.
        grid: cells per side.
    """
    if not masks:
        return np.full((grid, grid), -1)
    covered = np.stack([coverage(mask, grid) for mask in masks])  # [n, grid, grid]
    shares = np.concatenate([1 - covered.sum(axis=0, keepdims=True), covered])
    owners: npt.NDArray[np.int64] = shares.argmax(axis=0) - 1
    return owners


def outline_maps(masks: Sequence[npt.NDArray[np.bool_]], size: int) -> npt.NDArray[np.float32]:
    """Return maps of objects and of their outlines, float32 ``[2, size, size]``, 0..1.

    The first map is the fraction of a pixel that objects cover. The second is one minus the
    fraction of the object or background that covers most of the pixel: it is above 0 on outlines,
    including those between two objects.

    Args:
        masks: masks that do not overlap, bool [S, S] each; S is a multiple of ``size``.
        size: pixels per side.
    """
    if not masks:
        return np.zeros((_OUTLINE_MAPS, size, size), np.float32)
    covered = np.stack([coverage(mask, size) for mask in masks])  # [n, size, size]
    objects = covered.sum(axis=0)
    mixed = 1 - np.maximum(covered.max(axis=0), 1 - objects)
    return np.stack([objects, mixed]).clip(0, 1)


def coverage(mask: npt.NDArray[np.bool_], size: int) -> npt.NDArray[np.float32]:
    """Return the fraction of each cell that a mask covers, float32 [size, size].

    Args:
        mask: bool [S, S]; S is a multiple of ``size``.
        size: cells per side.
    """
    step = mask.shape[0] // size
    cells = mask.reshape(size, step, size, step)
    covered: npt.NDArray[np.float32] = cells.mean(axis=(1, 3), dtype=np.float32)
    return covered


class NeighborHead(nn.Module):
    """Linear classifiers of the neighbour on the outputs of the image decoder's transformer.

    Args:
        image_embed_dim: number of channels C.
        num_names: number of names K.
    """

    def __init__(self, image_embed_dim: int, num_names: int) -> None:
        super().__init__()
        self.mark = nn.Linear(image_embed_dim, 1)
        self.name = nn.Linear(image_embed_dim, num_names + 1)

    def loss(
        self, image: torch.Tensor, tokens: torch.Tensor, cells: torch.Tensor, names: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the cross-entropies over cells and over names, a scalar.

        Args:
            image: image side of the transformer, float ``[P, grid * grid, C]``.
            tokens: semantic token of each region, float ``[P, C]``.
            cells: fraction of each cell that the neighbour covers; 0 if the caption names no
                neighbour, float ``[P, grid, grid]``.
            names: index of the neighbour's name; K without one, int64 ``[P]``.
        """
        marks = self.mark(image).squeeze(2).float()  # [P, grid * grid]
        cell_loss = F.binary_cross_entropy_with_logits(marks, cells.flatten(1))
        return _CELLS_WEIGHT * cell_loss + F.cross_entropy(self.name(tokens).float(), names)
