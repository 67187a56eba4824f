"""The text decoder: a causal transformer that generates a caption from one semantic token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tap_deploy.config import (
    BOS_ID,
    EOS_ID,
    ROTARY_BASE,
    TEXT_HEAD_DIM,
    TapConfig,
)
from tap_deploy.reference.layers import FeedForward, attend, layer_norm, merge_heads, split_heads


def rotary_table(num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of rotary embeddings, float32 ``[positions, head_dim / 2]`` each."""
    exponent = torch.arange(0, TEXT_HEAD_DIM, 2, dtype=torch.float32) / TEXT_HEAD_DIM
    position = torch.arange(num_positions, dtype=torch.float32)
    angle = torch.outer(position, 1.0 / ROTARY_BASE**exponent)
    return angle.cos(), angle.sin()


def rotate_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (2i, 2i + 1) of ``x`` [P, heads, S, head_dim] by S positions."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class CausalAttention(nn.Module):
    """Self-attention with rotary embeddings and a KV cache."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: torch.Tensor, past: int
    ) -> torch.Tensor:
        """Attend from S new positions to the ``past`` cached ones and to themselves.

        Args:
            x: input of the new positions, ``[P, S, D]``.
            cos: cosine at the new positions, ``[S, head_dim / 2]``.
            sin: sine at the new positions, ``[S, head_dim / 2]``.
            cache: ``[2, P, heads, positions, head_dim]``; the new slots are written in place.
            past: number of filled slots.
        """
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(x).chunk(3, dim=-1))
        q, k = rotate_interleaved(q, cos, sin), rotate_interleaved(k, cos, sin)
        now = past + x.shape[1]
        cache[0, :, :, past:now], cache[1, :, :, past:now] = k, v
        future = torch.ones(now, now, dtype=torch.bool, device=x.device).triu(1)[past:]
        bias = torch.zeros_like(future, dtype=x.dtype).masked_fill(future, float("-inf"))
        keys, values = cache[0, :, :, :now], cache[1, :, :, :now]
        out: torch.Tensor = self.proj(merge_heads(attend(q, keys, values, bias)))
        return out


class TextBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = CausalAttention(dim, heads)
        self.mlp = FeedForward(dim, 4 * dim)
        self.norm1 = layer_norm(dim)
        self.norm2 = layer_norm(dim)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: torch.Tensor, past: int
    ) -> torch.Tensor:
        """Map ``[P, S, D]`` to the same shape; see ``CausalAttention.forward``."""
        x = x + self.attn(self.norm1(x), cos, sin, cache, past)
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class TextTransformer(nn.Module):
    """Token embedding, blocks and the projection to the vocabulary."""

    def __init__(self, config: TapConfig) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.text_dim)
        self.blocks = nn.ModuleList(
            TextBlock(config.text_dim, config.text_heads) for _ in range(config.text_depth)
        )
        self.norm = layer_norm(config.text_dim)
        self.text_proj = nn.Linear(config.text_dim, config.vocab_size, bias=False)


class TextDecoder(nn.Module):
    """Generates caption token ids from semantic tokens."""

    def __init__(self, config: TapConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.Linear(config.image_embed_dim, config.text_dim, bias=False)
        self.transformer = TextTransformer(config)

    def new_cache(self, num_prompts: int) -> torch.Tensor:
        """Return an empty cache ``[layers, 2, P, heads, positions, head_dim]``."""
        c = self.config
        shape = (c.text_depth, 2, num_prompts, c.text_heads, c.text_seq_len, TEXT_HEAD_DIM)
        return self.encoder.weight.new_zeros(shape)

    def decode(
        self, x: torch.Tensor, cache: torch.Tensor | Sequence[torch.Tensor], past: int
    ) -> torch.Tensor:
        """Run S new embeddings [P, S, D] through the blocks; return logits [P, S, V].

        The cache is that of ``new_cache``, or a sequence of its layers.
        """
        cos, sin = (t.to(x) for t in rotary_table(past + x.shape[1]))
        for layer, block in enumerate(self.transformer.blocks):
            x = block(x, cos[past:], sin[past:], cache[layer], past)
        out: torch.Tensor = self.transformer.text_proj(self.transformer.norm(x))
        return out

    def forward(self, semantic_tokens: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Score given captions (teacher forcing).

        Args:
            semantic_tokens: float ``[P, C]``.
            input_ids: integer ``[P, L]``, starting with BOS.

        Returns:
            Logits float ``[P, L, V]``; entry ``i`` predicts the token after ``input_ids[:, i]``.
        """
        prefix = self.encoder(semantic_tokens).unsqueeze(1)
        x = torch.cat([prefix, self.transformer.tok_embeddings(input_ids)], dim=1)
        # Separate memory per layer: autograd rejects tensors modified in place by later layers.
        cache = [layer.clone() for layer in self.new_cache(len(x))]
        return self.decode(x, cache, past=0)[:, 1:]

    def generate(
        self,
        semantic_tokens: torch.Tensor,
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator | None,
        stop_at_eos: bool,
    ) -> torch.Tensor:
        """Generate captions; see ``TapModel.generate``."""
        num_prompts, device = len(semantic_tokens), semantic_tokens.device
        shape = (num_prompts, self.config.text_seq_len - 1)
        ids = torch.full(shape, self.config.pad_id, dtype=torch.int64, device=device)
        ids[:, 0] = BOS_ID
        cache = self.new_cache(num_prompts)
        self.decode(self.encoder(semantic_tokens).unsqueeze(1), cache, past=0)
        finished = torch.zeros(num_prompts, dtype=torch.bool, device=device)
        for i in range(max_new_tokens):
            embedding = self.transformer.tok_embeddings(ids[:, i : i + 1])
            logits = self.decode(embedding, cache, past=i + 1)[:, 0]
            chosen = choose_tokens(logits, temperature, generator)
            ids[:, i + 1] = torch.where(finished, self.config.pad_id, chosen)
            if stop_at_eos:
                finished |= chosen == EOS_ID
                if bool(finished.all()):
                    break
        return ids


def choose_tokens(
    logits: torch.Tensor, temperature: float, generator: torch.Generator | None
) -> torch.Tensor:
    """Return an id per row of ``logits`` [P, V]: the argmax, or drawn if the temperature is > 0."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits / temperature).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
