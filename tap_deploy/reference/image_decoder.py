"""The image decoder: prompts and image embeddings to masks, IoU and semantic tokens."""

from __future__ import annotations

import typing

import torch
from torch import nn

from tap_deploy.config import PROMPT_DECODER_MLP_DIM, TapConfig
from tap_deploy.reference.layers import (
    FeedForward,
    Head,
    LayerNorm2d,
    attend,
    layer_norm,
    merge_heads,
    split_heads,
)


class PromptOutputs(typing.NamedTuple):
    """Outputs of the prompt decoder for P prompts.

    Attributes:
        low_res_masks: mask logits, float ``[P, M, 4 * grid, 4 * grid]``.
        iou_predictions: predicted IoU of each mask, float ``[P, M]``.
        semantic_tokens: input of the text decoder, float ``[P, M, C]``.
        semantic_embeddings: embeddings to compare with concepts, float ``[P, M, E]``.
    """

    low_res_masks: torch.Tensor
    iou_predictions: torch.Tensor
    semantic_tokens: torch.Tensor
    semantic_embeddings: torch.Tensor


class Attention(nn.Module):
    """Attention from one set of tokens to another, with its own inner width."""

    def __init__(self, dim: int, inner_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, inner_dim)
        self.k_proj = nn.Linear(dim, inner_dim)
        self.v_proj = nn.Linear(dim, inner_dim)
        self.proj = nn.Linear(inner_dim, dim)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend from ``q`` [P, Q, D] to ``k`` and ``v`` [P or 1, K, D]; return [P, Q, D]."""
        out = attend(
            split_heads(self.q_proj(q), self.heads),
            split_heads(self.k_proj(k), self.heads),
            split_heads(self.v_proj(v), self.heads),
        )
        projected: torch.Tensor = self.proj(merge_heads(out))
        return projected


class TwoWayBlock(nn.Module):
    """Self-attention of the tokens, then cross-attention from tokens to image and back."""

    def __init__(self, dim: int, heads: int, *, is_first: bool) -> None:
        super().__init__()
        self.is_first = is_first
        self.self_attn = Attention(dim, dim, heads)
        self.norm1 = layer_norm(dim)
        self.cross_attn_token_to_image = Attention(dim, dim // 2, heads)
        self.norm2 = layer_norm(dim)
        self.mlp = FeedForward(dim, PROMPT_DECODER_MLP_DIM, nn.ReLU)
        self.norm3 = layer_norm(dim)
        self.cross_attn_image_to_token = Attention(dim, dim // 2, heads)
        self.norm4 = layer_norm(dim)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, q_pos: torch.Tensor, k_pos: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Update tokens ``q`` [P, T, D] and image ``k`` [P or 1, S, D].

        Until the image side attends to the prompts, its batch size may be 1, so that work shared
        by all prompts of an image is done once.
        """
        if self.is_first:
            q = self.norm1(self.self_attn(q, q, q))
        else:
            q = self.norm1(q + self.self_attn(q + q_pos, q + q_pos, q))
        image_key = k + k_pos
        q = self.norm2(q + self.cross_attn_token_to_image(q + q_pos, image_key, k))
        q = self.norm3(q + self.mlp(q))
        k = self.norm4(k + self.cross_attn_image_to_token(image_key, q + q_pos, q))
        return q, k


class TwoWayTransformer(nn.Module):
    """The blocks, and a final attention from tokens to image."""

    def __init__(self, dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TwoWayBlock(dim, heads, is_first=i == 0) for i in range(depth))
        self.final_attn_token_to_image = Attention(dim, dim // 2, heads)
        self.norm = layer_norm(dim)

    def forward(
        self, tokens: torch.Tensor, image: torch.Tensor, image_pos: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map tokens [P, T, D], image [P or 1, S, D], position [S, D] to [P, T, D], [P, S, D]."""
        q, k = tokens, image
        for block in self.blocks:
            q, k = block(q, k, tokens, image_pos)
        q = self.norm(q + self.final_attn_token_to_image(q + tokens, k + image_pos, k))
        return q, k


class ImageDecoder(nn.Module):
    """Tokens, two-way transformer and heads."""

    def __init__(self, config: TapConfig) -> None:
        super().__init__()
        dim, num_tokens = config.image_embed_dim, config.num_mask_tokens
        self.num_mask_tokens, self.grid_size = num_tokens, config.grid_size
        self.transformer = TwoWayTransformer(
            dim, config.prompt_decoder_heads, config.prompt_decoder_depth
        )
        self.iou_token = nn.Embedding(1, dim)
        self.sem_tokens = nn.Embedding(num_tokens, dim)
        self.mask_tokens = nn.Embedding(num_tokens, dim)
        self.output_conv = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, 2, stride=2),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, 2, stride=2),
            nn.GELU(),
        )
        self.mask_pred = nn.ModuleList(Head(dim, dim, dim // 8) for _ in range(num_tokens))
        self.iou_pred = Head(dim, dim, num_tokens)
        self.sem_pred = Head(dim, config.sem_embed_dim, config.sem_embed_dim)

    def query_tokens(self, sparse_prompt_embeddings: torch.Tensor) -> torch.Tensor:
        """Prepend the output tokens to the prompt [P, N, C]; return [P, 2 * M + 1 + N, C]."""
        own = torch.cat([self.sem_tokens.weight, self.iou_token.weight, self.mask_tokens.weight])
        own = own.unsqueeze(0).expand(sparse_prompt_embeddings.shape[0], -1, -1)
        return torch.cat([own, sparse_prompt_embeddings], dim=1)

    def split_tokens(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return semantic [P, M, C], IoU [P, C] and mask [P, M, C] tokens."""
        m = self.num_mask_tokens
        return tokens[:, :m], tokens[:, m], tokens[:, m + 1 : 2 * m + 1]

    def mask_kernels(self, mask_tokens: torch.Tensor) -> torch.Tensor:
        """Map mask tokens [P, M, C] to mask kernels [P, M, C / 8]."""
        kernels = [head(mask_tokens[:, i]) for i, head in enumerate(self.mask_pred)]
        return torch.stack(kernels, dim=1)

    def forward(
        self,
        image_embeddings: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        image_pos: torch.Tensor,
    ) -> PromptOutputs:
        """Decode P prompts.

        Args:
            image_embeddings: ``[1, C, grid, grid]`` for all prompts, or one each ``[P, ...]``.
            sparse_prompt_embeddings: ``[P, N, C]``.
            image_pos: position encoding of the grid, ``[grid * grid, C]``.
        """
        return self.read(*self.attend(image_embeddings, sparse_prompt_embeddings, image_pos))

    def attend(
        self,
        image_embeddings: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        image_pos: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the transformer; return tokens ``[P, T, C]`` and image ``[P, S, C]``.

        The arguments are those of ``forward``.
        """
        tokens = self.query_tokens(sparse_prompt_embeddings)
        image = image_embeddings.flatten(2).transpose(1, 2)  # [P or 1, S, C]
        attended: tuple[torch.Tensor, torch.Tensor] = self.transformer(tokens, image, image_pos)
        return attended

    def read(self, tokens: torch.Tensor, image: torch.Tensor) -> PromptOutputs:
        """Compute the outputs from the tokens and image that ``attend`` returns."""
        semantic, iou, mask = self.split_tokens(tokens)
        image = image.transpose(1, 2).unflatten(2, (self.grid_size, self.grid_size))
        upscaled = self.output_conv(image)  # [P, C / 8, 4 * grid, 4 * grid]
        low_res_masks = (self.mask_kernels(mask) @ upscaled.flatten(2)).unflatten(
            2, tuple(upscaled.shape[-2:])
        )
        return PromptOutputs(low_res_masks, self.iou_pred(iou), semantic, self.sem_pred(semantic))
