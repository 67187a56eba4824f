"""The image encoder: a ViT with window attention only, and convolutions across windows."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tap_deploy.config import NUM_FEATURE_LEVELS, TapConfig
from tap_deploy.reference.layers import (
    FeedForward,
    attend,
    layer_norm,
    merge_heads,
    split_heads,
)


def relative_index(window_size: int) -> torch.Tensor:
    """Return the column of the bias table for every pair of tokens in a window, int64 ``[S, S]``.

    ``S = window_size ** 2``; the offset is query position minus key position.
    """
    position = torch.arange(window_size**2)
    y, x = position // window_size, position % window_size
    dy = y[:, None] - y[None, :] + window_size - 1
    dx = x[:, None] - x[None, :] + window_size - 1
    return dy * (2 * window_size - 1) + dx


class RelativePositionBias(nn.Module):
    """A learned bias per head and relative offset."""

    index: torch.Tensor

    def __init__(self, window_size: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, (2 * window_size - 1) ** 2))
        self.register_buffer("index", relative_index(window_size))

    def forward(self) -> torch.Tensor:
        """Return the bias, float ``[heads, S, S]``."""
        return self.weight[:, self.index]


class WindowAttention(nn.Module):
    """Self-attention among the tokens of one window."""

    def __init__(self, dim: int, heads: int, window_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_embed = RelativePositionBias(window_size, heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[B * windows, S, D]`` to the same shape."""
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(x).chunk(3, dim=-1))
        out: torch.Tensor = self.proj(merge_heads(attend(q, k, v, self.rel_pos_embed())))
        return out


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: TapConfig) -> None:
        super().__init__()
        dim = config.encoder_dim
        self.norm1 = layer_norm(dim)
        self.attn = WindowAttention(dim, config.encoder_heads, config.window_size)
        self.norm2 = layer_norm(dim)
        self.mlp = FeedForward(dim, 4 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[B * windows, S, D]`` to the same shape."""
        x = x + self.attn(self.norm1(x))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class Bottleneck(nn.Module):
    """Convolutions over the whole map: the only connection between windows."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = dim // 2
        self.conv1 = nn.Conv2d(dim, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, dim, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[B, D, grid, grid]`` to the same shape."""
        y = F.gelu(self.norm1(self.conv1(x)))
        y = F.gelu(self.norm2(self.conv2(y)))
        out: torch.Tensor = x + self.norm3(self.conv3(y))
        return out


class Neck(nn.Module):
    """Reduces the number of channels to that of the image embeddings."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        lateral = nn.Sequential(nn.Conv2d(dim, out_dim, 1, bias=False), nn.BatchNorm2d(out_dim))
        output = nn.Sequential(
            nn.Conv2d(out_dim, out_dim, 3, padding=1, bias=False), nn.BatchNorm2d(out_dim)
        )
        self.lateral_conv = nn.ModuleList([lateral])
        self.output_conv = nn.ModuleList([output])

    @property
    def lateral_layers(self) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        """The convolution that reduces the channels, and its norm."""
        return tuple(self.lateral_conv[0].children())  # type: ignore[return-value]

    @property
    def output_layers(self) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        """The last convolution, and its norm."""
        return tuple(self.output_conv[0].children())  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[B, D, grid, grid]`` to ``[B, C, grid, grid]``."""
        out: torch.Tensor = self.output_conv[0](self.lateral_conv[0](x))
        return out


class PatchEmbed(nn.Module):
    """Cuts the image into patches and projects each."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[B, 3, H, W]`` to ``[B, D, grid, grid]``."""
        out: torch.Tensor = self.proj(x)
        return out


class PositionTable(nn.Module):
    """A learned vector per grid token."""

    def __init__(self, num_tokens: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_tokens, dim))


class ImageEncoder(nn.Module):
    """Encodes a normalised image as image embeddings."""

    def __init__(self, config: TapConfig) -> None:
        super().__init__()
        self.grid_size, self.window_size = config.grid_size, config.window_size
        self.patch_embed = PatchEmbed(config.patch_size, config.encoder_dim)
        self.pos_embed = PositionTable(config.grid_size**2, config.encoder_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.encoder_depth))
        self.norm = layer_norm(config.encoder_dim)
        self.cross_conv = nn.ModuleList(
            Bottleneck(config.encoder_dim) for _ in range(NUM_FEATURE_LEVELS)
        )
        self.neck = Neck(config.encoder_dim, config.image_embed_dim)

    def partition(self, x: torch.Tensor) -> torch.Tensor:
        """Cut a map into windows: ``[B, D, grid, grid]`` to ``[B * windows, S, D]``."""
        w, n = self.window_size, self.grid_size // self.window_size
        x = x.unflatten(3, (n, w)).unflatten(2, (n, w))  # [B, D, n, w, n, w]
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """Undo ``partition``: ``[B * windows, S, D]`` to ``[B, D, grid, grid]``."""
        w, n = self.window_size, self.grid_size // self.window_size
        x = x.unflatten(1, (w, w)).unflatten(0, (-1, n, n))  # [B, n, n, w, w, D]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Embed patches and their positions: ``[B, 3, H, W]`` to ``[B, D, grid, grid]``."""
        table = self.pos_embed.weight.T.unflatten(1, (self.grid_size, self.grid_size))
        out: torch.Tensor = self.patch_embed(x) + table
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map a normalised image ``[B, 3, H, W]`` to ``[B, C, grid, grid]``."""
        x = self.partition(self.embed(x))
        stride = len(self.blocks) // NUM_FEATURE_LEVELS
        for i, block in enumerate(self.blocks):
            x = block(x)
            level, end_of_level = i // stride, (i + 1) % stride == 0
            if not end_of_level:
                continue
            if i == len(self.blocks) - 1:
                return self.neck(self.cross_conv[level](self.merge(self.norm(x))))  # type: ignore[no-any-return]
            x = self.partition(self.cross_conv[level](self.merge(x)))
        raise AssertionError("the depth is a multiple of the number of levels")
