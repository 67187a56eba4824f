"""Layers shared by several parts of the model."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from tap_deploy.config import LAYER_NORM_EPS


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention, in a form that engine builders recognise and fuse.

    The scale is applied to the query, and the bias is added before the softmax.

    Args:
        query: float ``[B, heads, Q, head_dim]``.
        key: float ``[B, heads, K, head_dim]``; its batch axis may be 1.
        value: float ``[B, heads, K, head_dim]``; its batch axis may be 1.
        bias: float, broadcast to ``[B, heads, Q, K]``.

    Returns:
        float ``[B, heads, Q, head_dim]``.
    """
    scale: float = query.shape[-1] ** -0.5
    scores = (query * scale) @ key.transpose(-2, -1)  # [B, heads, Q, K]
    if bias is not None:
        scores = scores + bias
    attended: torch.Tensor = scores.softmax(dim=-1) @ value
    return attended


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Reshape ``[B, S, heads * head_dim]`` to ``[B, heads, S, head_dim]``."""
    split: torch.Tensor = x.unflatten(-1, (heads, x.shape[-1] // heads))
    return split.transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """Reshape ``[B, heads, S, head_dim]`` to ``[B, S, heads * head_dim]``."""
    return x.transpose(1, 2).flatten(2)


def layer_norm(dim: int) -> nn.LayerNorm:
    """Return a LayerNorm with the epsilon of TAP."""
    return nn.LayerNorm(dim, eps=LAYER_NORM_EPS)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map ``[B, C, H, W]``."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=LAYER_NORM_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``[B, C, H, W]`` over C at every pixel."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FeedForward(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, dim: int, hidden_dim: int, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.activation = activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., dim]`` to ``[..., dim]``."""
        out: torch.Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


class Head(nn.Module):
    """Three Linear layers with ReLU, applied to one kind of output token."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        dims = (dim, hidden_dim, hidden_dim, out_dim)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(dims))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., dim]`` to ``[..., out_dim]``."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        out: torch.Tensor = last(x)
        return out
