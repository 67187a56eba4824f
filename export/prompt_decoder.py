"""The prompt decoder as a graph: image embeddings and points to masks and semantic tokens."""

from __future__ import annotations

import typing
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from tap_deploy.config import PointLabel
from tap_deploy.export.folding import linear_from_conv_transpose
from tap_deploy.graphs import ANSWERING_TOKEN
from tap_deploy.masks import BOX_BONUS
from tap_deploy.reference.layers import LayerNorm2d
from tap_deploy.reference.model import TapModel


class MaskUpscaler(nn.Module):
    """Draw the masks token by token, without a transposed convolution.

    The reference makes a ``[P, C / 8, 4 * grid, 4 * grid]`` map and then its product with the
    mask kernels. Here the image side stays ``[P, tokens, channels]`` all along, and only the
    finished masks, M channels instead of C / 8, are put in picture order. M are the masks asked
    for.
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
        """Image side [P, S, C] and kernels [P, M, C / 8] to logits [P, M, 4 grid, 4 grid]."""
        grid, m = self.grid_size, kernels.shape[1]
        x = self.up1(image).unflatten(2, (4, -1))  # [P, S, 4, C / 4]
        x = F.gelu(self.norm(x))
        x = F.gelu(self.up2(x).unflatten(3, (4, -1)))  # [P, S, 4, 4, C / 8]
        masks = kernels @ x.flatten(1, 3).transpose(1, 2)  # [P, M, S * 16]
        blocks = masks.reshape(-1, grid, grid, 2, 2, 2, 2)  # y, x, dy, dx, ddy, ddx
        return blocks.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, m, 4 * grid, 4 * grid)


class AnsweringToken(nn.Module):
    """Which mask token answers a prompt: the rule of ``masks.select_mask_token``, in a graph.

    The largest score is compared with all of them, and the first that equals it is taken: of
    tokens that score alike, as they do in fp16 now and then, every runtime takes the same one.
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
        """Float [P, tokens] and int32 [P, N] to int32 [P, 1]."""
        boxed = point_labels[:, :1] == PointLabel.BOX_LEFT_TOP
        scores = iou_predictions + torch.where(boxed, self.bonus, -self.bonus)
        last = self.numbers[-1]
        first = torch.where(scores == scores.amax(dim=1, keepdim=True), self.numbers, last)
        return first.amin(dim=1, keepdim=True)


class GraphOutputs(typing.NamedTuple):
    """The outputs of the graph, in the order and with the shapes of its spec."""

    low_res_masks: torch.Tensor
    iou_predictions: torch.Tensor
    mask_index: torch.Tensor
    semantic_tokens: torch.Tensor
    semantic_embeddings: torch.Tensor


class PromptDecoderGraph(nn.Module):
    """What ``prompt_decoder.onnx`` computes for P prompts on one image.

    The image side keeps a batch axis of 1 until the first prompt touches it, so its
    projections in block 0 are computed once for all prompts. Of what follows the transformer,
    only the answers that are asked for are computed.
    """

    image_position: torch.Tensor

    def __init__(self, model: TapModel) -> None:
        super().__init__()
        self.prompt_encoder, self.decoder = model.prompt_encoder, model.image_decoder
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
    ) -> GraphOutputs:
        """[1, C, grid, grid], float32 [P, N, 2], int32 [P, N] and [P, M] to the five outputs."""
        sparse = self.prompt_encoder(point_coords, point_labels)
        tokens = self.decoder.query_tokens(sparse)
        image = image_embeddings.flatten(2).transpose(1, 2)  # [1, S, C]
        tokens, image = self.decoder.transformer(tokens, image, self.image_position)
        semantic, iou, mask = self.decoder.split_tokens(tokens)
        iou_predictions = self.decoder.iou_pred(iou)
        answering = self.answering_token(iou_predictions, point_labels)
        index = torch.where(mask_request == ANSWERING_TOKEN, answering, mask_request)  # [P, M]
        semantic = _rows(semantic, index)
        return GraphOutputs(
            self.upscaler(image, _rows(self.decoder.mask_kernels(mask), index)),
            iou_predictions,
            index,
            semantic,
            self.decoder.sem_pred(semantic),
        )


def _rows(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Take rows M of ``values`` [P, tokens, channels] by ``index`` [P, M]: [P, M, channels]."""
    return values.gather(1, index.long().unsqueeze(2).expand(-1, -1, values.shape[2]))
