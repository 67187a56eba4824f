"""An auxiliary head on semantic tokens: which object is beside a region, and where it is.

Captions tell of a neighbour in a few of their tokens, so they teach it late: for thousands of
steps every caption gives the place. Asking the semantic token directly teaches it early. The head
helps training, and is dropped.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tap_deploy.training.captions import RELATIONS

NO_RELATION = len(RELATIONS)


class NeighborHead(nn.Module):
    """Linear classifiers: the name of the neighbour, and the direction it is seen from."""

    def __init__(self, image_embed_dim: int, num_names: int) -> None:
        super().__init__()
        self.name = nn.Linear(image_embed_dim, num_names + 1)
        self.relation = nn.Linear(image_embed_dim, len(RELATIONS) + 1)

    def loss(
        self, semantic_tokens: torch.Tensor, neighbors: torch.Tensor, relations: torch.Tensor
    ) -> torch.Tensor:
        """Sum of both cross-entropies, averaged over P regions, a scalar.

        Args:
            semantic_tokens: float ``[P, C]``, of the chosen masks.
            neighbors: int64 ``[P]``, a name, or K for none.
            relations: int64 ``[P]``, places in ``RELATIONS``, or ``NO_RELATION``.
        """
        name_loss = F.cross_entropy(self.name(semantic_tokens).float(), neighbors)
        return name_loss + F.cross_entropy(self.relation(semantic_tokens).float(), relations)
