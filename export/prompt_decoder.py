"""The prompt decoder as a graph: image embeddings and points to masks and semantic tokens."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from tap_deploy.export.folding import linear_from_conv_transpose
from tap_deploy.reference.image_decoder import PromptOutputs
from tap_deploy.reference.layers import LayerNorm2d
from tap_deploy.reference.model import TapModel


class MaskUpscaler(nn.Module):
    """Draw the masks token by token, without a transposed convolution.

    The reference makes a ``[P, C / 8, 4 * grid, 4 * grid]`` map and then its product with the
    mask kernels. Here the image side stays ``[P, tokens, channels]`` all along, and only the
    finished masks, M channels instead of C / 8, are put in picture order.
    """

    def __init__(self, model: TapModel) -> None:
        super().__init__()
        conv = model.image_decoder.output_conv
        self.grid_size = model.config.grid_size
        self.num_masks = model.config.num_mask_tokens
        norm = cast("LayerNorm2d", conv[1])
        self.up1 = linear_from_conv_transpose(cast("nn.ConvTranspose2d", conv[0]))
        self.norm = nn.LayerNorm(norm.normalized_shape, eps=norm.eps)
        self.norm.weight, self.norm.bias = norm.weight, norm.bias
        self.up2 = linear_from_conv_transpose(cast("nn.ConvTranspose2d", conv[3]))

    def forward(self, image: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """Image side [P, S, C] and kernels [P, M, C / 8] to logits [P, M, 4 grid, 4 grid]."""
        grid, m = self.grid_size, self.num_masks
        x = self.up1(image).unflatten(2, (4, -1))  # [P, S, 4, C / 4]
        x = F.gelu(self.norm(x))
        x = F.gelu(self.up2(x).unflatten(3, (4, -1)))  # [P, S, 4, 4, C / 8]
        masks = kernels @ x.flatten(1, 3).transpose(1, 2)  # [P, M, S * 16]
        blocks = masks.reshape(-1, grid, grid, 2, 2, 2, 2)  # y, x, dy, dx, ddy, ddx
        return blocks.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, m, 4 * grid, 4 * grid)


class PromptDecoderGraph(nn.Module):
    """What ``prompt_decoder.onnx`` computes for P prompts on one image.

    The image side keeps a batch axis of 1 until the first prompt touches it, so its
    projections in block 0 are computed once for all prompts.
    """

    image_position: torch.Tensor

    def __init__(self, model: TapModel) -> None:
        super().__init__()
        self.prompt_encoder, self.decoder = model.prompt_encoder, model.image_decoder
        self.upscaler = MaskUpscaler(model)
        position = model.prompt_encoder.image_position_encoding()
        self.register_buffer("image_position", position)

    def forward(
        self,
        image_embeddings: torch.Tensor,
        point_coords: torch.Tensor,
        point_labels: torch.Tensor,
    ) -> PromptOutputs:
        """[1, C, grid, grid], float32 [P, N, 2] and int32 [P, N] to the four outputs."""
        sparse = self.prompt_encoder(point_coords, point_labels)
        tokens = self.decoder.query_tokens(sparse)
        image = image_embeddings.flatten(2).transpose(1, 2)  # [1, S, C]
        tokens, image = self.decoder.transformer(tokens, image, self.image_position)
        semantic, iou, mask = self.decoder.split_tokens(tokens)
        low_res_masks = self.upscaler(image, self.decoder.mask_kernels(mask))
        return PromptOutputs(
            low_res_masks,
            self.decoder.iou_pred(iou),
            semantic.clone(),
            self.decoder.sem_pred(semantic),
        )
