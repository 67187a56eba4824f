"""The image encoder graph: uint8 picture in the model frame to image embeddings."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from tap_deploy.export.folding import folded_conv, linear_from_conv
from tap_deploy.reference.image_encoder import Block, Bottleneck, ImageEncoder, WindowAttention
from tap_deploy.reference.layers import attend, merge_heads
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
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = (t.squeeze(0) for t in qkv.chunk(3))  # [B * windows, heads, S, head_dim]
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
    """A bottleneck on windows, whose BatchNorms are folded into its convolutions.

    Only the 3x3 convolution needs the map, at half the width; the others are Linear layers.
    """

    def __init__(self, bottleneck: Bottleneck, encoder: ImageEncoder) -> None:
        super().__init__()
        self.merge, self.partition = encoder.merge, encoder.partition
        self.conv1 = linear_from_conv(folded_conv(bottleneck.conv1, bottleneck.norm1))
        self.conv2 = folded_conv(bottleneck.conv2, bottleneck.norm2)
        self.conv3 = linear_from_conv(folded_conv(bottleneck.conv3, bottleneck.norm3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[B * windows, S, D]`` to the same shape."""
        y = F.gelu(on_rows(self.conv1, x))
        y = self.partition(F.gelu(self.conv2(self.merge(y))))
        return x + on_rows(self.conv3, y)


class ImageEncoderGraph(nn.Module):
    """The module exported as ``image_encoder.onnx``; it shares weights with the reference.

    Tokens stay in windows from the patches to the neck.
    """

    def __init__(self, model: TapModel) -> None:
        super().__init__()
        encoder = model.image_encoder
        self.patch_size, self.window_size = model.config.patch_size, model.config.window_size
        self.merge = encoder.merge
        self.pixel_mean, self.pixel_rsig = model.pixel_mean, model.pixel_rsig
        self.patch_embed = linear_from_conv(encoder.patch_embed.proj)
        table = encoder.pos_embed.weight.T.unflatten(1, (encoder.grid_size, encoder.grid_size))
        self.position_table = encoder.partition(table.unsqueeze(0)).contiguous()
        blocks, convs = (
            cast("list[Block]", encoder.blocks),
            cast("list[Bottleneck]", encoder.cross_conv),
        )
        self.blocks = nn.ModuleList(GraphBlock(block) for block in blocks)
        self.norm = encoder.norm
        self.cross_conv = nn.ModuleList(GraphBottleneck(conv, encoder) for conv in convs)
        self.lateral_conv = linear_from_conv(folded_conv(*encoder.neck.lateral_layers))
        self.output_conv = folded_conv(*encoder.neck.output_layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map uint8 BGR ``[B, S, S, 3]`` to float ``[B, C, grid, grid]``."""
        x = (images.to(torch.float32) - self.pixel_mean) * self.pixel_rsig
        x = on_rows(self.patch_embed, self.patches(x))
        x = (x.unflatten(0, (-1, len(self.position_table))) + self.position_table).flatten(0, 1)
        blocks_per_level = len(self.blocks) // len(self.cross_conv)
        for level, cross_conv in enumerate(self.cross_conv):
            start = level * blocks_per_level
            for block in self.blocks[start : start + blocks_per_level]:
                x = block(x)
            if level == len(self.cross_conv) - 1:
                x = self.norm(x)
            x = cross_conv(x)
        out: torch.Tensor = self.output_conv(self.merge(on_rows(self.lateral_conv, x)))
        return out

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        """Cut ``[B, S, S, 3]`` into the patches of each window, ``[B * windows, S, p * p * 3]``."""
        window, patch = self.window_size, self.patch_size
        x = images.unflatten(2, (-1, window, patch)).unflatten(1, (-1, window, patch))
        x = x.permute(0, 1, 4, 2, 5, 3, 6, 7)  # [B, n, n, window, window, patch, patch, 3]
        out: torch.Tensor = x.flatten(5).flatten(3, 4).flatten(0, 2)
        return out


def on_rows(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Apply a Linear to ``[B, S, D]`` as one Gemm, which adds the bias before it rounds.

    The bias of a folded BatchNorm may cancel most of the product; in fp16, an Add after the
    rounding would lose what remains.
    """
    rows: torch.Tensor = linear(x.flatten(0, 1))
    out: torch.Tensor = rows.unflatten(0, (-1, x.shape[1]))
    return out
