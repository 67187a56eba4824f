"""The auxiliary head of relations: where the neighbour of a region is, and what it is called.

A caption such as "a pear left of a guitar" needs a token that has looked at another object than
the one that was asked for. Nothing else in the objective rewards that until the last word comes
out right, so by itself it is not learned for thousands of steps. It helps training, and is dropped.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

_CELLS_WEIGHT = 4.0  # beside the names: most cells are easy, so their mean is small


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
