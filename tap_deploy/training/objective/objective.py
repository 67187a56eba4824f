"""The joint objective: the total loss of a batch over two prompt stages."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from tap_deploy.reference.image_decoder import PromptOutputs
from tap_deploy.reference.model import TapModel
from tap_deploy.training.config import TrainingConfig
from tap_deploy.training.objective.batches import Batch
from tap_deploy.training.objective.heads import DenseHead, NeighborHead
from tap_deploy.training.objective.losses import (
    ConceptSpace,
    answering_tokens,
    caption_loss,
    iou_loss,
    mask_ious,
    mask_losses,
)
from tap_deploy.training.objective.prompt_sampling import extra_points

_POINTS_SEED = 7  # separates the random numbers of the second stage from other uses of the seed


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Losses:
    """The terms of the objective, scalar tensors.

    Attributes:
        total: sum of the terms with the weights of the config; only it has a gradient.
        mask: focal and dice loss, mean over both stages.
        iou: squared error of IoU predictions, mean over both stages.
        concept: KL divergence of concepts, mean over both stages.
        caption: cross-entropy of captions, mean over both stages.
        dense: loss of ``DenseHead``; 0 if ``dense_weight`` is 0.
        neighbor: loss of ``NeighborHead``, mean over both stages; 0 if ``dense_weight`` is 0.
    """

    total: torch.Tensor
    mask: torch.Tensor
    iou: torch.Tensor
    concept: torch.Tensor
    caption: torch.Tensor
    dense: torch.Tensor
    neighbor: torch.Tensor

    def terms(self) -> dict[str, torch.Tensor]:
        """Return all terms by name, without gradients."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name).detach() for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Stage:
    """Result of one pass of the decoders.

    Attributes:
        mask: focal and dice loss, scalar.
        iou: squared error of IoU predictions, scalar.
        concept: KL divergence of concepts, scalar.
        caption: cross-entropy of captions, scalar.
        neighbor: loss of ``NeighborHead``, scalar.
        logits: mask of the token with the lowest mask loss, for the next pass, ``[P, S, S]``.
    """

    mask: torch.Tensor
    iou: torch.Tensor
    concept: torch.Tensor
    caption: torch.Tensor
    neighbor: torch.Tensor
    logits: torch.Tensor


class AuxiliaryHeads(nn.Module):
    """The auxiliary heads on the image embeddings and on the image decoder."""

    def __init__(self, image_embed_dim: int, num_names: int) -> None:
        super().__init__()
        self.dense = DenseHead(image_embed_dim, num_names)
        self.neighbor = NeighborHead(image_embed_dim, num_names)


class Objective(nn.Module):
    """Computes the losses from the model, the auxiliary heads and the concepts."""

    def __init__(
        self, config: TrainingConfig, model: TapModel, heads: AuxiliaryHeads, concepts: ConceptSpace
    ) -> None:
        super().__init__()
        self.config, self.model, self.heads, self.concepts = config, model, heads, concepts

    def forward(self, batch: Batch, step: int, dtype: torch.dtype) -> Losses:
        """Return the losses of a batch.

        Args:
            batch: batch on the device of the model.
            step: step, counted from 0; it determines the weight of the auxiliary heads and seeds
                the points of the second stage.
            dtype: dtype of matrix products, float32 or bfloat16.
        """
        with self._autocast(batch, dtype):
            images = self.model.encode_image(batch.images)  # [B, C, grid, grid]
        embeddings = images.repeat_interleave(batch.regions_per_picture, dim=0)  # [P, ...]
        auxiliary = self.config.dense_weight_at(step) > 0
        first = self._stage(
            embeddings, batch, batch.point_coords, batch.point_labels, dtype, auxiliary
        )
        coords, labels = self._second_prompts(batch, first, step)
        second = self._stage(embeddings, batch, coords, labels, dtype, auxiliary)
        return self._sum(first, second, self._dense_loss(images, batch, auxiliary), step)

    def _stage(
        self,
        embeddings: torch.Tensor,
        batch: Batch,
        coords: torch.Tensor,
        labels: torch.Tensor,
        dtype: torch.dtype,
        auxiliary: bool,
    ) -> _Stage:
        outputs, image = self._decode(embeddings, coords, labels, dtype)
        logits = outputs.low_res_masks.float()
        answering = answering_tokens(labels, logits.shape[1])
        losses = mask_losses(logits, batch.targets).masked_fill(~answering, torch.inf)
        lowest, best = losses.min(dim=1)
        rows = torch.arange(len(best), device=best.device)
        predictions = outputs.iou_predictions.float()
        # Train names and captions on the token that is selected at inference. It may differ from
        # the best one, which is known only with the target.
        chosen = predictions.detach().masked_fill(~answering, -torch.inf).argmax(dim=1)
        return _Stage(
            mask=lowest.mean(),
            iou=iou_loss(predictions, mask_ious(logits, batch.targets), answering),
            concept=self.concepts.loss(
                outputs.semantic_embeddings[rows, chosen].float(), batch.concepts
            ),
            caption=self._caption_loss(outputs.semantic_tokens[rows, chosen], batch, dtype),
            neighbor=self._neighbor_loss(
                image, outputs.semantic_tokens[rows, chosen], batch, auxiliary
            ),
            logits=logits[rows, best].detach(),
        )

    def _decode(
        self,
        embeddings: torch.Tensor,
        coords: torch.Tensor,
        labels: torch.Tensor,
        dtype: torch.dtype,
    ) -> tuple[PromptOutputs, torch.Tensor]:
        """Return the result of ``TapModel.decode_prompts``, and the transformer's image side.

        Fourier features need float32 in every mode.
        """
        decoder = self.model.image_decoder
        sparse = self.model.prompt_encoder(coords, labels)
        position = self.model.prompt_encoder.image_position_encoding()
        with torch.autocast(coords.device.type, dtype, enabled=dtype != torch.float32):
            tokens, image = decoder.attend(embeddings, sparse, position)
            return decoder.read(tokens, image), image

    def _caption_loss(self, tokens: torch.Tensor, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        with self._autocast(batch, dtype):
            logits = self.model.text_decoder(tokens, batch.caption_ids[:, :-1])
        return caption_loss(logits.float(), batch.caption_ids, self.config.model.pad_id)

    def _neighbor_loss(
        self, image: torch.Tensor, tokens: torch.Tensor, batch: Batch, auxiliary: bool
    ) -> torch.Tensor:
        if not auxiliary:
            return torch.zeros((), device=image.device)
        return self.heads.neighbor.loss(
            image.float(), tokens.float(), batch.neighbor_cells, batch.neighbor_names
        )

    def _second_prompts(
        self, batch: Batch, first: _Stage, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(
            (self.config.seed * 1_000_003 + step) * 16 + _POINTS_SEED
        )
        coords, labels = extra_points(
            first.logits,
            batch.targets,
            max_points=self.config.max_extra_points,
            sketch_share=self.config.sketch_share,
            image_size=self.config.model.image_size,
            generator=generator,
        )
        return (
            torch.cat([batch.point_coords, coords], dim=1),
            torch.cat([batch.point_labels, labels], dim=1),
        )

    def _dense_loss(self, images: torch.Tensor, batch: Batch, auxiliary: bool) -> torch.Tensor:
        if not auxiliary:
            return torch.zeros((), device=images.device)
        return self.heads.dense.loss(
            images.float(), batch.cell_classes, batch.cell_captions, batch.outlines
        )

    def _sum(self, first: _Stage, second: _Stage, dense: torch.Tensor, step: int) -> Losses:
        weights = self.config
        mask, iou = (first.mask + second.mask) / 2, (first.iou + second.iou) / 2
        concept = (first.concept + second.concept) / 2
        caption = (first.caption + second.caption) / 2
        neighbor = (first.neighbor + second.neighbor) / 2
        total = (
            weights.mask_weight * mask
            + weights.iou_weight * iou
            + weights.concept_weight * concept
            + weights.caption_weight * caption
            + weights.dense_weight_at(step) * (dense + neighbor)
        )
        return Losses(
            total=total,
            mask=mask.detach(),
            iou=iou.detach(),
            concept=concept.detach(),
            caption=caption.detach(),
            dense=dense.detach(),
            neighbor=neighbor.detach(),
        )

    @staticmethod
    def _autocast(batch: Batch, dtype: torch.dtype) -> torch.autocast:
        return torch.autocast(batch.images.device.type, dtype, enabled=dtype != torch.float32)
