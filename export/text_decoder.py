"""The text decoder as a graph: one autoregressive step with a KV cache."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from tap_deploy.config import TEXT_HEAD_DIM
from tap_deploy.export.folding import half_split_qkv
from tap_deploy.reference.model import TapModel
from tap_deploy.reference.text_decoder import TextBlock, rotary_table


def rotate_half_split(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of ``x`` [P, heads, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class GraphTextBlock(nn.Module):
    """A transformer block for one new position."""

    def __init__(self, block: TextBlock) -> None:
        super().__init__()
        self.heads = block.attn.heads
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.qkv, self.proj = half_split_qkv(block.attn.qkv), block.attn.proj

    def attend(
        self,
        x: torch.Tensor,
        past: torch.Tensor,
        mask: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``x`` [P, D], ``past`` [T, 2, P, heads, head_dim], ``mask`` [T] to [P, D] and K, V.

        The new position looks at the cache and at itself; keeping the two apart spares a
        copy of the cache for every layer.
        """
        q, k, v = (t.unflatten(1, (self.heads, -1)) for t in self.qkv(x).chunk(3, dim=-1))
        q = rotate_half_split(q, cos, sin) * TEXT_HEAD_DIM**-0.5
        k = rotate_half_split(k, cos, sin)
        past_k, past_v = past[:, 0], past[:, 1]  # [T, P, heads, head_dim]
        scores_past = q.unsqueeze(2) @ past_k.permute(1, 2, 3, 0) + mask  # [P, heads, 1, T]
        score_self = (q * k).sum(dim=-1, keepdim=True).unsqueeze(3)  # [P, heads, 1, 1]
        weights = torch.cat([score_self, scores_past], dim=-1).softmax(dim=-1)
        out = weights[..., 1:] @ past_v.permute(1, 2, 0, 3)  # [P, heads, 1, head_dim]
        out = out + weights[..., :1] * v.unsqueeze(2)
        return self.proj(out.flatten(1)), torch.stack([k, v])

    def forward(
        self,
        x: torch.Tensor,
        past: torch.Tensor,
        mask: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map ``x`` [P, D] to the same shape; also return the new slot [2, P, heads, dim]."""
        attended, slot = self.attend(self.norm1(x), past, mask, cos, sin)
        x = x + attended
        return x + self.mlp(self.norm2(x)), slot


class TextDecoderGraph(nn.Module):
    """What ``text_decoder.onnx`` computes; see ``graphs.graph_specs`` for the contract."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, model: TapModel) -> None:
        super().__init__()
        decoder = model.text_decoder
        self.encoder, self.tok_embeddings = decoder.encoder, decoder.transformer.tok_embeddings
        blocks = cast("list[TextBlock]", decoder.transformer.blocks)
        self.blocks = nn.ModuleList(GraphTextBlock(block) for block in blocks)
        self.norm, self.text_proj = decoder.transformer.norm, decoder.transformer.text_proj
        cos, sin = rotary_table(model.config.text_seq_len)
        self.register_buffer("cos", torch.cat([cos, cos], dim=-1))
        self.register_buffer("sin", torch.cat([sin, sin], dim=-1))

    def past_mask(self, past_key_values: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Addend of the scores, float32 [T]: 0 on filled slots, hugely negative elsewhere."""
        slots = torch.arange(past_key_values.shape[0], dtype=torch.int32)
        hidden = torch.finfo(torch.float32).min
        return torch.where(slots < position, 0.0, hidden)

    def forward(
        self,
        semantic_tokens: torch.Tensor,
        input_ids: torch.Tensor,
        position: torch.Tensor,
        past_key_values: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run position ``position`` for P regions.

        float [P, C], int32 [P], int32 [1], float [T, layers, 2, P, heads, head_dim] to
        next ids int32 [P], logits float [P, V], new slot [1, layers, 2, P, heads, head_dim].
        """
        prefix, embedding = self.encoder(semantic_tokens), self.tok_embeddings(input_ids)
        x = torch.where(position == 0, prefix, embedding)  # [P, D]
        mask = self.past_mask(past_key_values, position)
        cos, sin = F.embedding(position, self.cos), F.embedding(position, self.sin)  # [1, head_dim]
        slots = []
        for layer, block in enumerate(self.blocks):
            x, slot = block(x, past_key_values[:, layer], mask, cos, sin)
            slots.append(slot)
        logits = self.text_proj(self.norm(x))
        return logits.argmax(dim=-1).to(torch.int32), logits, torch.stack(slots).unsqueeze(0)
