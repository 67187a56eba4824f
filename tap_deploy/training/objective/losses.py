"""The loss terms of TAP's joint objective.

Shapes: P prompts, M mask tokens, S the side of low-resolution masks, E the size of semantic
embeddings, K concepts, L caption tokens.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tap_deploy.concepts import Vocabulary
from tap_deploy.config import PointLabel

FOCAL_WEIGHT = 20.0
MASK_THRESHOLD = 0.5  # targets above it are foreground


def answering_tokens(point_labels: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return which mask tokens may answer: token 0 boxes, the others points; bool ``[P, M]``.

    Args:
        point_labels: integer ``[P, N]``, see ``PointLabel``.
        num_tokens: number of mask tokens M.
    """
    is_box = point_labels[:, :1] == PointLabel.BOX_LEFT_TOP  # [P, 1]
    is_first = torch.arange(num_tokens, device=point_labels.device) == 0  # [M]
    return is_first == is_box


def mask_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return 20 x focal loss + dice loss of every token's mask, float ``[P, M]``.

    The focal loss has gamma 2. For targets of 0 and 1 its factor ``(y - p) ** 2`` is the usual
    ``(1 - p_t) ** 2``; for fractional targets it is 0 at ``p = y``.

    Args:
        logits: float ``[P, M, S, S]``.
        targets: fraction of each pixel that the object covers, 0..1, float ``[P, S, S]``. At a
            fractional pixel the optimum is that probability, which places the edge (the zero
            crossing of the logits) with subpixel precision.
    """
    logits, y = logits.flatten(2), targets.flatten(1).unsqueeze(1)  # [P, M, S * S], [P, 1, S * S]
    p = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, y.expand_as(p), reduction="none")
    focal = (cross_entropy * (y - p).square()).mean(dim=2)
    dice = 1 - (2 * (p * y).sum(dim=2) + 1) / (p.sum(dim=2) + y.sum(dim=2) + 1)
    return FOCAL_WEIGHT * focal + dice


def mask_ious(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the IoU of every token's mask, without gradient, float ``[P, M]``.

    The arguments are those of ``mask_losses``. Two empty masks have an IoU of 1.
    """
    found = logits.detach().flatten(2) > 0
    true = (targets.flatten(1) > MASK_THRESHOLD).unsqueeze(1)
    union = (found | true).sum(dim=2)
    both = (found & true).sum(dim=2)
    return torch.where(union == 0, 1.0, both / union.clamp(min=1))


def iou_loss(
    predictions: torch.Tensor, ious: torch.Tensor, answering: torch.Tensor
) -> torch.Tensor:
    """Return the mean squared error of the IoU predictions of answering tokens, a scalar.

    All answering tokens count, not only the best, because the predictions select among them.

    Args:
        predictions: float ``[P, M]``.
        ious: result of ``mask_ious``, float ``[P, M]``.
        answering: result of ``answering_tokens``, bool ``[P, M]``.
    """
    return (predictions - ious).square()[answering].mean()


class ConceptSpace(torch.nn.Module):
    """A vocabulary with the target distributions of the concept loss.

    Attributes:
        weights: unit columns times the logit scale, float32 ``[E, K]``.
        targets: row i is the distribution for the vector of concept i itself, float32 ``[K, K]``.
    """

    weights: torch.Tensor
    targets: torch.Tensor

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        weights = torch.from_numpy(vocabulary.weights.copy())
        units = F.normalize(weights, dim=0)
        self.register_buffer("weights", weights)
        self.register_buffer("targets", (units.T @ weights).softmax(dim=1))

    def log_probabilities(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return log probabilities of all concepts for embeddings [P, E], float ``[P, K]``."""
        return (F.normalize(embeddings, dim=1) @ self.weights).log_softmax(dim=1)

    def loss(self, embeddings: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
        """Return the mean KL divergence from the targets of ``concepts`` int64 [P], a scalar."""
        return F.kl_div(
            self.log_probabilities(embeddings), self.targets[concepts], reduction="batchmean"
        )


def caption_loss(logits: torch.Tensor, ids: torch.Tensor, pad_id: int) -> torch.Tensor:
    """Return the cross-entropy of the next token, averaged over all caption tokens, a scalar.

    Args:
        logits: entry ``i`` predicts the token after ``ids[:, i]``, float ``[P, L - 1, V]``.
        ids: BOS, the caption, EOS and padding, int64 ``[P, L]``.
        pad_id: padding id, which occurs in no caption.
    """
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad_id)
