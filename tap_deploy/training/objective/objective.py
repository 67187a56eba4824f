"""The joint objective: one batch through the model in two stages, to one number."""

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

_POINTS_SEED = 7  # keeps the draws of the second stage apart from other uses of the seed


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Losses:
    """The terms of the objective, scalars, each a mean over both stages.

    ``total`` is their sum with the weights of the config; only it has a gradient. Those of the
    auxiliary heads are 0 where their weight is.
    """

    total: torch.Tensor
    mask: torch.Tensor
    iou: torch.Tensor
    concept: torch.Tensor
    caption: torch.Tensor
    dense: torch.Tensor
    neighbor: torch.Tensor

    def terms(self) -> dict[str, torch.Tensor]:
        """Return everything by name, without gradients."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name).detach() for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Stage:
    """What one pass of the decoders gives: the terms, and the masks for the next pass."""

    mask: torch.Tensor
    iou: torch.Tensor
    concept: torch.Tensor
    caption: torch.Tensor
    neighbor: torch.Tensor
    logits: torch.Tensor  # [P, S, S] of the token that has the lowest mask loss


class AuxiliaryHeads(nn.Module):
    """What is asked beside the answers: of the image embeddings, and of the image decoder."""

    def __init__(self, image_embed_dim: int, num_names: int) -> None:
        super().__init__()
        self.dense = DenseHead(image_embed_dim, num_names)
        self.neighbor = NeighborHead(image_embed_dim, num_names)


class Objective(nn.Module):
    """The model, the auxiliary heads and the concepts, as far as the loss is concerned."""

    def __init__(
        self, config: TrainingConfig, model: TapModel, heads: AuxiliaryHeads, concepts: ConceptSpace
    ) -> None:
        super().__init__()
        self.config, self.model, self.heads, self.concepts = config, model, heads, concepts

    def forward(self, batch: Batch, step: int, dtype: torch.dtype) -> Losses:
        """Return the losses of a batch.

        Args:
            batch: on the device of the model.
            step: counted from 0; it decides on the weight of the auxiliary head and seeds the
                points of the second stage.
            dtype: of the products, float32 or bfloat16.
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
        # Names and captions are asked of the token that will be asked later on, too. It need not
        # be the best one: which that is can only be known here.
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
        """As ``TapModel.decode_prompts``, and the image side of the transformer.

        Fourier features need float32 at any dtype.
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
