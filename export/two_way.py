"""The two-way transformer of the prompt decoder, arranged so that no image per prompt is projected.

A prompt has about ten tokens, its image has thousands. An attention between them needs the product
of every token with every image position, per head. The reference projects the image to the inner
width of the attention first. Here the *tokens* carry the weights of both projections to the image
side: with the columns of head h selected by a mask m_h,

    (x W_q)_h (t W_k)_h^T = x (W_q (m_h * t W_k)^T)

so the image is multiplied once by ``heads * T`` vectors instead of being projected, split into
heads, transposed and multiplied by ``T`` vectors. The same holds for the values. Products have the
width of the image instead of that of a head, which matrix units prefer. It saves a third of the
operations for boxes (``T = 11``) and costs as many with 7 points.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import nn

from tap_deploy.reference.image_decoder import Attention, TwoWayBlock, TwoWayTransformer


class HeadAttention(nn.Module):
    """Base of both directions: the weights of an attention, and its heads as masks."""

    mask: torch.Tensor

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        inner = attention.q_proj.out_features
        heads = torch.arange(attention.heads).repeat_interleave(inner // attention.heads)
        mask = heads == torch.arange(attention.heads)[:, None]  # [heads, inner]
        self.register_buffer("mask", mask.unsqueeze(1).float())
        self.scale = (inner // attention.heads) ** -0.5

    def per_head(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens [P, T, inner] to one row per head and token, [P, heads * T, inner].

        A row is zero outside its head.
        """
        return (tokens.unsqueeze(1) * self.mask).flatten(1, 2)


class TokenToImage(HeadAttention):
    """Attention from tokens to an image per prompt."""

    def __init__(self, attention: Attention) -> None:
        super().__init__(attention)
        self.q_proj, self.v_proj, self.proj = attention.q_proj, attention.v_proj, attention.proj
        # The bias of the keys adds the same to all scores of a token: softmax cancels it.
        self.k_proj = linear(attention.k_proj.weight.T)

    def forward(self, tokens: torch.Tensor, key: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Map tokens [P, T, D], keys and image [P, S, D] to [P, T, D]."""
        queries = self.k_proj(self.per_head(self.q_proj(tokens) * self.scale))  # [P, heads * T, D]
        # The image is on the left, as runtimes repack the right operand for every product.
        scores = (key @ queries.transpose(1, 2)).transpose(1, 2)  # [P, heads * T, S]
        weights = scores.softmax(dim=-1)
        values = self.v_proj(weights @ image)  # [P, heads * T, inner]
        own = values.unflatten(1, (self.mask.shape[0], -1)) * self.mask
        out: torch.Tensor = self.proj(own.sum(dim=1))
        return out


class ImageToToken(HeadAttention):
    """Attention from the image to the tokens of a prompt."""

    q_bias: torch.Tensor

    def __init__(self, attention: Attention, *, shares_image: bool) -> None:
        super().__init__(attention)
        self.shares_image = shares_image
        self.k_proj, self.v_proj = attention.k_proj, attention.v_proj
        self.q_proj = attention.q_proj if shares_image else linear(attention.q_proj.weight.T)
        self.register_buffer("q_bias", attention.q_proj.bias.detach())
        self.proj, self.proj_bias = linear(attention.proj.weight), attention.proj.bias

    def forward(self, image: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Map the image [P or 1, S, D], keys and values [P, T, D] to [P, S, D]."""
        keys = self.per_head(self.k_proj(key) * self.scale)  # [P, heads * T, inner]
        # Scores are [P, heads * T, S]: softmax over T is vectorized over S, while rows of length T
        # would be shorter than a vector.
        if self.shares_image:
            scores = keys @ self.q_proj(image).transpose(1, 2)
        else:
            bias = (keys * self.q_bias).sum(dim=-1, keepdim=True)
            scores = self.q_proj(keys) @ image.transpose(1, 2) + bias
        heads = self.mask.shape[0]
        weights = scores.unflatten(1, (heads, -1)).softmax(dim=2).flatten(1, 2)
        values = self.proj(self.per_head(self.v_proj(value))) + self.proj_bias / heads
        # Contains the bias once: the weights of a head sum to 1.
        out: torch.Tensor = weights.transpose(1, 2) @ values
        return out


class GraphTwoWayBlock(nn.Module):
    """A two-way block. The first one gets the image once, for all prompts."""

    def __init__(self, block: TwoWayBlock) -> None:
        super().__init__()
        self.is_first = block.is_first
        self.self_attn, self.mlp = block.self_attn, block.mlp
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.norm3, self.norm4 = block.norm3, block.norm4
        to_image = block.cross_attn_token_to_image
        self.cross_attn_token_to_image = to_image if block.is_first else TokenToImage(to_image)
        self.cross_attn_image_to_token = ImageToToken(
            block.cross_attn_image_to_token, shares_image=block.is_first
        )

    forward = TwoWayBlock.forward


class FinalAttention(nn.Module):
    """The last attention from tokens to image, and its norm, for some of the tokens.

    Here tokens do not attend to each other, so only those that are used are computed.
    """

    def __init__(self, transformer: TwoWayTransformer) -> None:
        super().__init__()
        # A copy, because the exporter does not transpose weights that several nodes use.
        self.attn = TokenToImage(copy.deepcopy(transformer.final_attn_token_to_image))
        self.norm = transformer.norm

    def forward(
        self, q: torch.Tensor, tokens: torch.Tensor, key: torch.Tensor, image: torch.Tensor
    ) -> torch.Tensor:
        """Apply attention and norm.

        Args:
            q: tokens after the blocks, [P, T, D].
            tokens: the same ones before the blocks, [P, T, D].
            key: sum of image and position, [P, S, D].
            image: [P, S, D].
        """
        out: torch.Tensor = self.norm(q + self.attn(q + tokens, key, image))
        return out


class GraphTwoWayTransformer(nn.Module):
    """The blocks, and apart from them the final attention: for the IoU token, then the others."""

    def __init__(self, transformer: TwoWayTransformer) -> None:
        super().__init__()
        blocks = cast("list[TwoWayBlock]", transformer.blocks)
        self.blocks = nn.ModuleList(GraphTwoWayBlock(block) for block in blocks)
        self.final_iou, self.final = FinalAttention(transformer), FinalAttention(transformer)

    def forward(
        self, tokens: torch.Tensor, image: torch.Tensor, image_pos: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the blocks on tokens [P, T, D], image [1, S, D] and its position [S, D].

        Returns:
            Tokens [P, T, D] and image [P, S, D], before the final attention.
        """
        q, k = tokens, image
        for block in self.blocks:
            q, k = block(q, k, tokens, image_pos)
        return q, k


def linear(weight: torch.Tensor) -> nn.Linear:
    """Return a Linear without bias with the weights [outputs, inputs]."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    return made
