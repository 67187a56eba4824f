"""The terms of the joint objective of TAP.

Shapes: P prompts, M mask tokens, S the side of low-resolution masks, E the size of a semantic
embedding, K concepts, L tokens of a caption.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tap_deploy.concepts import Vocabulary
from tap_deploy.config import PointLabel

FOCAL_WEIGHT = 20.0
MASK_THRESHOLD = 0.5  # of a target: the part of a low-resolution pixel that the object covers


def answering_tokens(point_labels: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Tell which mask tokens may answer: token 0 boxes, the others points; bool ``[P, M]``.

    Args:
        point_labels: integer ``[P, N]``, see ``PointLabel``.
        num_tokens: M.
    """
    is_box = point_labels[:, :1] == PointLabel.BOX_LEFT_TOP  # [P, 1]
    is_first = torch.arange(num_tokens, device=point_labels.device) == 0  # [M]
    return is_first == is_box


def mask_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """20 x focal loss + dice loss of every token's mask, float ``[P, M]``.

    Args:
        logits: float ``[P, M, S, S]``.
        targets: float ``[P, S, S]``, 0..1. A value in between is a pixel that the object covers
            in part: the best answer is then that probability, which puts the edge, where the
            logits cross 0, between the pixels.

    The focal loss has gamma 2. For targets of 0 and 1 its factor ``(y - p) ** 2`` is the usual
    ``(1 - p_t) ** 2``; for those in between it is 0 where the answer is right.
    """
    logits, y = logits.flatten(2), targets.flatten(1).unsqueeze(1)  # [P, M, S * S], [P, 1, S * S]
    p = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, y.expand_as(p), reduction="none")
    focal = (cross_entropy * (y - p).square()).mean(dim=2)
    dice = 1 - (2 * (p * y).sum(dim=2) + 1) / (p.sum(dim=2) + y.sum(dim=2) + 1)
    return FOCAL_WEIGHT * focal + dice


def mask_ious(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Intersection over union of every token's mask, without gradient, float ``[P, M]``.

    Arguments as in ``mask_losses``. Two empty masks have an IoU of 1.
    """
    found = logits.detach().flatten(2) > 0
    true = (targets.flatten(1) > MASK_THRESHOLD).unsqueeze(1)
    union = (found | true).sum(dim=2)
    both = (found & true).sum(dim=2)
    return torch.where(union == 0, 1.0, both / union.clamp(min=1))


def iou_loss(
    predictions: torch.Tensor, ious: torch.Tensor, answering: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of the IoU predictions of the tokens that may answer, a scalar.

    All of them and not only the best: the choice among them rests on these numbers.

    Args:
        predictions: float ``[P, M]``.
        ious: float ``[P, M]``, from ``mask_ious``.
        answering: bool ``[P, M]``.
    """
    return (predictions - ious).square()[answering].mean()


class ConceptSpace(torch.nn.Module):
    """A vocabulary, and how alike its concepts are: the target of the concept loss.

    weights: float32 ``[E, K]``, unit columns times the logit scale.
    targets: float32 ``[K, K]``, row i is the distribution that the vector of concept i itself has.
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
        """Cosine-normalised embeddings ``[P, E]`` against every concept, float ``[P, K]``."""
        return (F.normalize(embeddings, dim=1) @ self.weights).log_softmax(dim=1)

    def loss(self, embeddings: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
        """KL divergence from the targets of ``concepts`` int64 [P], averaged over P, a scalar."""
        return F.kl_div(
            self.log_probabilities(embeddings), self.targets[concepts], reduction="batchmean"
        )


def caption_loss(logits: torch.Tensor, ids: torch.Tensor, pad_id: int) -> torch.Tensor:
    """Cross-entropy of the next token, averaged over the tokens of all captions, a scalar.

    Args:
        logits: float ``[P, L - 1, V]``, entry ``i`` for the token after ``ids[:, i]``.
        ids: int64 ``[P, L]``, BOS, the caption, EOS and padding.
        pad_id: id of the padding, which no caption holds.
    """
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad_id)
