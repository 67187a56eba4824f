"""The text decoder graph: one autoregressive step with a KV cache."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from tap_deploy.config import TEXT_HEAD_DIM
from tap_deploy.export.folding import scaled_queries
from tap_deploy.reference.model import TapModel
from tap_deploy.reference.text_decoder import TextBlock, rotary_table


def rotation_table(num_positions: int) -> torch.Tensor:
    """Return rotary embeddings as matrices, float32 ``[positions, head_dim, head_dim]``.

    Multiplying a row by the matrix of a position rotates it. This is one product for all heads,
    instead of seven nodes of slices, negations and sums.
    """
    cos, sin = rotary_table(num_positions)  # [positions, head_dim / 2]
    table = torch.zeros(num_positions, TEXT_HEAD_DIM, TEXT_HEAD_DIM)
    even = torch.arange(0, TEXT_HEAD_DIM, 2)
    table[:, even, even] = table[:, even + 1, even + 1] = cos
    table[:, even, even + 1], table[:, even + 1, even] = sin, -sin
    return table


class GraphTextBlock(nn.Module):
    """A transformer block for one new position."""

    def __init__(self, block: TextBlock) -> None:
        super().__init__()
        self.heads = block.attn.heads
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.qkv, self.proj = scaled_queries(block.attn.qkv), block.attn.proj

    def attend(
        self,
        x: torch.Tensor,
        past_k: torch.Tensor,
        past_v: torch.Tensor,
        mask: torch.Tensor,
        rotation: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attend from the new position to the cache and to itself.

        The two are kept separate, which avoids a copy of the cache per layer.

        Args:
            x: ``[P, D]``.
            past_k: ``[P, heads, T, head_dim]``, rotated.
            past_v: ``[P, heads, T, head_dim]``.
            mask: ``[T]``.
            rotation: ``[head_dim, head_dim]``.

        Returns:
            ``[P, D]``, and K and V of the new slot, ``[P, heads, 1, head_dim]`` each.
        """
        # Split into equal parts: onnxruntime copies unequal sizes to the GPU at every step.
        q, k, v = self.qkv(x).unflatten(1, (3 * self.heads, 1, -1)).chunk(3, dim=1)
        q, k = q @ rotation, k @ rotation  # [P, heads, 1, head_dim]
        scores_past = q @ past_k.transpose(2, 3) + mask  # [P, heads, 1, T]
        score_self = (q * k).sum(dim=-1, keepdim=True)  # [P, heads, 1, 1]
        weights = torch.cat([score_self, scores_past], dim=-1).softmax(dim=-1)
        out = weights[..., 1:] @ past_v + weights[..., :1] * v  # [P, heads, 1, head_dim]
        return self.proj(out.flatten(1)), k, v

    def forward(
        self,
        x: torch.Tensor,
        past_k: torch.Tensor,
        past_v: torch.Tensor,
        mask: torch.Tensor,
        rotation: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Map ``x`` [P, D] to the same shape; also return K and V of the new slot."""
        attended, k, v = self.attend(self.norm1(x), past_k, past_v, mask, rotation)
        x = x + attended
        return x + self.mlp(self.norm2(x)), k, v


class TextDecoderGraph(nn.Module):
    """The module exported as ``text_decoder.onnx``; its contract is in ``graphs.graph_specs``."""

    rotations: torch.Tensor

    def __init__(self, model: TapModel) -> None:
        super().__init__()
        decoder = model.text_decoder
        self.encoder, self.tok_embeddings = decoder.encoder, decoder.transformer.tok_embeddings
        blocks = cast("list[TextBlock]", decoder.transformer.blocks)
        self.blocks = nn.ModuleList(GraphTextBlock(block) for block in blocks)
        self.norm, self.text_proj = decoder.transformer.norm, decoder.transformer.text_proj
        self.register_buffer("rotations", rotation_table(model.config.text_seq_len))

    def past_mask(self, past_k: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Return the attention mask, float32 [T]: 0 for filled slots, else the lowest float."""
        slots = torch.arange(past_k.shape[2], dtype=torch.int32)
        hidden = torch.finfo(torch.float32).min
        return torch.where(slots < position, 0.0, hidden)

    def next_ids(self, logits: torch.Tensor, gumbel_noise: torch.Tensor) -> torch.Tensor:
        """Draw tokens from the K largest of logits [P, V] with noise [P, K]; return int32 [P].

        K = 1 is greedy decoding.
        """
        values, ids = logits.topk(gumbel_noise.shape[1], dim=-1)  # [P, K]
        drawn = (values + gumbel_noise).argmax(dim=-1, keepdim=True)
        return ids.gather(1, drawn).squeeze(1).to(torch.int32)

    def forward(
        self,
        semantic_tokens: torch.Tensor,
        input_ids: torch.Tensor,
        position: torch.Tensor,
        gumbel_noise: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run one step for P regions.

        Args:
            semantic_tokens: float ``[P, C]``.
            input_ids: int32 ``[P]``.
            position: int32 ``[1]``.
            gumbel_noise: float32 ``[P, K]``.
            *past: K and V of each layer in turn, float ``[P, heads, T, head_dim]``.

        Returns:
            Next ids int32 ``[P]``, logits float ``[P, V]``, and K and V of the new slot, float
            ``[layers, 2, P, heads, head_dim]``.
        """
        prefix, embedding = self.encoder(semantic_tokens), self.tok_embeddings(input_ids)
        x = torch.where(position == 0, prefix, embedding)  # [P, D]
        mask = self.past_mask(past[0], position)
        rotation = self.rotations.index_select(0, position).squeeze(0)  # [head_dim, head_dim]
        slots = []
        for block, past_k, past_v in zip(self.blocks, past[::2], past[1::2], strict=True):
            x, k, v = block(x, past_k, past_v, mask, rotation)
            slots += [k, v]
        logits = self.text_proj(self.norm(x))
        # Like torch.stack, but without a copy of each slot.
        present = torch.cat(slots).squeeze(2).unflatten(0, (len(self.blocks), 2, -1))
        return self.next_ids(logits, gumbel_noise), logits, present
