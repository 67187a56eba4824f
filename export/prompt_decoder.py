"""The prompt decoder graph: image embeddings and points to masks and semantic tokens."""

from __future__ import annotations

import typing
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from tap_deploy.config import PointLabel
from tap_deploy.export.folding import linear_from_conv_transpose
from tap_deploy.export.two_way import GraphTwoWayTransformer
from tap_deploy.graphs import ANSWERING_TOKEN
from tap_deploy.masks import BOX_BONUS
from tap_deploy.reference.image_decoder import ImageDecoder
from tap_deploy.reference.layers import LayerNorm2d
from tap_deploy.reference.model import TapModel


class MaskUpscaler(nn.Module):
    """Upscales and computes the masks per image token, without transposed convolutions.

    The reference upscales to a map ``[P, C / 8, 4 * grid, 4 * grid]`` and multiplies it by the mask
    kernels. Here the image side stays ``[P, tokens, channels]``, and only the M requested masks are
    rearranged into picture order instead of C / 8 channels.
    """

    def __init__(self, model: TapModel) -> None:
        super().__init__()
        conv = model.image_decoder.output_conv
        self.grid_size = model.config.grid_size
        norm = cast("LayerNorm2d", conv[1])
        self.up1 = linear_from_conv_transpose(cast("nn.ConvTranspose2d", conv[0]))
        self.norm = nn.LayerNorm(norm.normalized_shape, eps=norm.eps)
        self.norm.weight, self.norm.bias = norm.weight, norm.bias
        self.up2 = linear_from_conv_transpose(cast("nn.ConvTranspose2d", conv[3]))

    def forward(self, image: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """Map image [P, S, C] and kernels [P, M, C / 8] to logits [P, M, 4 grid, 4 grid]."""
        grid, m = self.grid_size, kernels.shape[1]
        x = self.up1(image).unflatten(2, (4, -1)).flatten(1, 2)  # [P, S * 4, C / 4]
        x = F.gelu(self.norm(x))
        x = F.gelu(self.up2(x)).unflatten(2, (4, -1)).flatten(1, 2)  # [P, S * 16, C / 8]
        masks = kernels @ x.transpose(1, 2)  # [P, M, S * 16]
        blocks = masks.reshape(-1, grid, grid, 2, 2, 2, 2)  # y, x, dy, dx, ddy, ddx
        out: torch.Tensor = blocks.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, m, 4 * grid, 4 * grid)
        return out


class AnsweringToken(nn.Module):
    """Selects the mask token that answers a prompt, by the rule of ``masks.select_mask_token``.

    Ties, which occur in fp16, resolve to the first token: all scores are compared with the largest.
    Therefore every runtime selects the same token.
    """

    bonus: torch.Tensor
    numbers: torch.Tensor

    def __init__(self, num_mask_tokens: int) -> None:
        super().__init__()
        bonus = torch.zeros(num_mask_tokens)
        bonus[0] = BOX_BONUS
        self.register_buffer("bonus", bonus)
        self.register_buffer("numbers", torch.arange(num_mask_tokens, dtype=torch.int32))

    def forward(self, iou_predictions: torch.Tensor, point_labels: torch.Tensor) -> torch.Tensor:
        """Map IoU float [P, tokens] and labels int32 [P, N] to a token index, int32 [P, 1]."""
        boxed = point_labels[:, :1] == PointLabel.BOX_LEFT_TOP
        scores = iou_predictions + torch.where(boxed, self.bonus, -self.bonus)
        last = self.numbers[-1]
        first = torch.where(scores == scores.amax(dim=1, keepdim=True), self.numbers, last)
        return first.amin(dim=1, keepdim=True)


class GraphDecoder(nn.Module):
    """The transformer, and the heads of the image decoder."""

    def __init__(self, decoder: ImageDecoder) -> None:
        super().__init__()
        self.transformer = GraphTwoWayTransformer(decoder.transformer)
        self.iou_pred, self.sem_pred = decoder.iou_pred, decoder.sem_pred
        self.mask_pred = decoder.mask_pred

    def requested_kernels(self, tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Map mask tokens [P, M, C] of numbers ``index`` [P, M] to mask kernels [P, M, C / 8]."""
        kernels = torch.stack([head(tokens) for head in self.mask_pred], dim=2)
        rows = index.long().unflatten(1, (-1, 1, 1)).expand(-1, -1, 1, kernels.shape[3])
        return kernels.gather(2, rows).squeeze(2)


class GraphOutputs(typing.NamedTuple):
    """The outputs of the graph, in the order of its spec; see ``graphs.graph_specs``.

    Attributes:
        low_res_masks: logits of the requested masks, float ``[Q, M, 4 * grid, 4 * grid]``.
        iou_predictions: predicted IoU of every mask token, float ``[P, tokens]``.
        mask_index: mask token of each requested mask, int32 ``[P, M]``.
        semantic_tokens: input of the text decoder, float ``[P, M, C]``.
        semantic_embeddings: embeddings to compare with concepts, float ``[P, M, E]``.
    """

    low_res_masks: torch.Tensor
    iou_predictions: torch.Tensor
    mask_index: torch.Tensor
    semantic_tokens: torch.Tensor
    semantic_embeddings: torch.Tensor


class PromptDecoderGraph(nn.Module):
    """The module exported as ``prompt_decoder.onnx``: P prompts on one image.

    The image side keeps batch size 1 until it attends to the prompts, so that its projections in
    block 0 are computed once for all prompts. After the blocks, the IoU token is finished first, as
    it selects the mask token that answers; then only the requested tokens and masks are computed.
    """

    image_position: torch.Tensor
    own_tokens: torch.Tensor

    def __init__(self, model: TapModel) -> None:
        super().__init__()
        self.prompt_encoder, self.decoder = model.prompt_encoder, GraphDecoder(model.image_decoder)
        self.num_mask_tokens = model.config.num_mask_tokens
        iou = model.image_decoder.iou_token.weight
        own = model.image_decoder.query_tokens(iou.new_empty(1, 0, iou.shape[1]))
        self.register_buffer("own_tokens", own.detach())  # of every prompt, [1, 2 M + 1, C]
        self.upscaler = MaskUpscaler(model)
        self.answering_token = AnsweringToken(model.config.num_mask_tokens)
        position = model.prompt_encoder.image_position_encoding()
        self.register_buffer("image_position", position)

    def forward(
        self,
        image_embeddings: torch.Tensor,
        point_coords: torch.Tensor,
        point_labels: torch.Tensor,
        mask_request: torch.Tensor,
        mask_rows: torch.Tensor,
    ) -> GraphOutputs:
        """Decode P prompts.

        Args:
            image_embeddings: float ``[1, C, grid, grid]``.
            point_coords: float32 ``[P, N, 2]`` XY, pixels of the model frame.
            point_labels: int32 ``[P, N]``, see ``PointLabel``.
            mask_request: int32 ``[P, M]``, token indices or ``ANSWERING_TOKEN``.
            mask_rows: int32 ``[Q]``, the prompts whose masks are computed.
        """
        sparse = self.prompt_encoder(point_coords, point_labels)
        own = self.own_tokens.expand(sparse.shape[0], -1, -1)
        tokens = torch.cat([own, sparse], dim=1)
        image = image_embeddings.flatten(2).transpose(1, 2)  # [1, S, C]
        transformer, iou_row = self.decoder.transformer, self.num_mask_tokens
        q, image = transformer(tokens, image, self.image_position)
        key = image + self.image_position

        row = slice(iou_row, iou_row + 1)
        iou = transformer.final_iou(q[:, row], tokens[:, row], key, image)
        iou_predictions = self.decoder.iou_pred(iou.squeeze(1))
        answering = self.answering_token(iou_predictions, point_labels)
        index = torch.where(mask_request == ANSWERING_TOKEN, answering, mask_request)  # [P, M]

        rows = torch.cat([index, index + (iou_row + 1)], dim=1)  # semantic and mask tokens
        wanted = transformer.final(_rows(q, rows), _rows(tokens, rows), key, image)
        semantic, mask = wanted.unflatten(1, (2, -1)).unbind(1)  # [P, M, C] each
        kernels = self.decoder.requested_kernels(mask, index)
        return GraphOutputs(
            self.upscaler(image.index_select(0, mask_rows), kernels.index_select(0, mask_rows)),
            iou_predictions,
            index,
            semantic,
            self.decoder.sem_pred(semantic),
        )


def _rows(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather rows ``index`` [P, M] of ``values`` [P, tokens, channels]: [P, M, channels]."""
    return values.gather(1, index.long().unsqueeze(2).expand(-1, -1, values.shape[2]))
