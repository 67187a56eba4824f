"""The image encoder graph: uint8 picture in the model frame to image embeddings."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from tap_deploy.export.folding import folded_conv
from tap_deploy.reference.image_encoder import Block, Bottleneck, WindowAttention
from tap_deploy.reference.layers import attend, merge_heads, split_heads
from tap_deploy.reference.model import TapModel


class GraphWindowAttention(nn.Module):
    """Window attention whose position bias is a constant ``[1, heads, S, S]``."""

    bias: torch.Tensor

    def __init__(self, attention: WindowAttention) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = attention.heads, attention.qkv, attention.proj
        self.register_buffer("bias", attention.rel_pos_embed().unsqueeze(0).contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[B * windows, S, D]`` to the same shape."""
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(x).chunk(3, dim=-1))
        out: torch.Tensor = self.proj(merge_heads(attend(q, k, v, self.bias)))
        return out


class GraphBlock(nn.Module):
    """A transformer block around ``GraphWindowAttention``."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.attn = GraphWindowAttention(block.attn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[B * windows, S, D]`` to the same shape."""
        x = x + self.attn(self.norm1(x))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class GraphBottleneck(nn.Module):
    """A bottleneck whose BatchNorms are folded into its convolutions."""

    def __init__(self, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.conv1 = folded_conv(bottleneck.conv1, bottleneck.norm1)
        self.conv2 = folded_conv(bottleneck.conv2, bottleneck.norm2)
        self.conv3 = folded_conv(bottleneck.conv3, bottleneck.norm3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[B, D, grid, grid]`` to the same shape."""
        y = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        out: torch.Tensor = x + self.conv3(y)
        return out


class ImageEncoderGraph(nn.Module):
    """The module exported as ``image_encoder.onnx``; it shares weights with the reference."""

    def __init__(self, model: TapModel) -> None:
        super().__init__()
        encoder = model.image_encoder
        # A list keeps the encoder from being registered: only its reshapes are used.
        self.reference_encoder = [encoder]
        self.pixel_mean, self.pixel_rsig = model.pixel_mean, model.pixel_rsig
        self.patch_embed = encoder.patch_embed.proj
        self.position_table = encoder.pos_embed.weight.T.unflatten(
            1, (encoder.grid_size, encoder.grid_size)
        ).contiguous()
        blocks, convs = (
            cast("list[Block]", encoder.blocks),
            cast("list[Bottleneck]", encoder.cross_conv),
        )
        self.blocks = nn.ModuleList(GraphBlock(block) for block in blocks)
        self.norm = encoder.norm
        self.cross_conv = nn.ModuleList(GraphBottleneck(conv) for conv in convs)
        self.lateral_conv = folded_conv(*encoder.neck.lateral_layers)
        self.output_conv = folded_conv(*encoder.neck.output_layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map uint8 BGR ``[B, S, S, 3]`` to float ``[B, C, grid, grid]``."""
        encoder = self.reference_encoder[0]
        x = (images.to(torch.float32) - self.pixel_mean) * self.pixel_rsig
        x = self.patch_embed(x.permute(0, 3, 1, 2)) + self.position_table
        blocks_per_level = len(self.blocks) // len(self.cross_conv)
        for level, cross_conv in enumerate(self.cross_conv):
            x = encoder.partition(x)
            start = level * blocks_per_level
            for block in self.blocks[start : start + blocks_per_level]:
                x = block(x)
            if level == len(self.cross_conv) - 1:
                x = self.norm(x)
            x = cross_conv(encoder.merge(x))
        out: torch.Tensor = self.output_conv(self.lateral_conv(x))
        return out
