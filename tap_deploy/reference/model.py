"""TAP as one PyTorch module, with the names and shapes of the official checkpoints."""

from __future__ import annotations

import torch
from torch import nn

from tap_deploy.config import Preprocessing, TapConfig
from tap_deploy.reference.image_decoder import ImageDecoder, PromptOutputs
from tap_deploy.reference.image_encoder import ImageEncoder
from tap_deploy.reference.prompt_encoder import PromptEncoder
from tap_deploy.reference.text_decoder import TextDecoder


class TapModel(nn.Module):
    """Tokenize Anything: image encoder, prompt encoder, image decoder, text decoder.

    ``state_dict()`` has the names and shapes of the official checkpoints, so that they load
    with ``strict=True``. The model runs on a CPU and needs no attention package.

    Source: *Tokenize Anything via Prompting*, arXiv 2312.09128.
    """

    pixel_mean: torch.Tensor
    pixel_rsig: torch.Tensor

    def __init__(self, config: TapConfig) -> None:
        super().__init__()
        self.config = config
        preprocessing = Preprocessing()
        self.register_buffer("pixel_mean", torch.tensor(preprocessing.mean))
        self.register_buffer("pixel_rsig", 1.0 / torch.tensor(preprocessing.std))
        self.image_encoder = ImageEncoder(config)
        self.prompt_encoder = PromptEncoder(config)
        self.image_decoder = ImageDecoder(config)
        self.text_decoder = TextDecoder(config)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise pictures in the model frame, uint8 BGR ``[B, H, W, 3]``: ``[B, 3, H, W]``."""
        normalized = (images.to(self.pixel_mean.dtype) - self.pixel_mean) * self.pixel_rsig
        return normalized.permute(0, 3, 1, 2)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Encode pictures.

        Args:
            images: uint8 BGR ``[B, image_size, image_size, 3]``, scaled and padded.

        Returns:
            Image embeddings, float ``[B, C, grid, grid]``.
        """
        embeddings: torch.Tensor = self.image_encoder(self.normalize(images))
        return embeddings

    def decode_prompts(
        self,
        image_embeddings: torch.Tensor,
        point_coords: torch.Tensor,
        point_labels: torch.Tensor,
    ) -> PromptOutputs:
        """Decode P prompts.

        Args:
            image_embeddings: ``[1, C, grid, grid]`` shared by all prompts, or ``[P, ...]``.
            point_coords: float32 ``[P, N, 2]`` XY, pixels of the model frame.
            point_labels: integer ``[P, N]``, see ``PointLabel``.
        """
        # The prompt encoder stays float32 in a half-precision model, as pixels need 11 bits.
        dtype = image_embeddings.dtype
        sparse = self.prompt_encoder(point_coords, point_labels).to(dtype)
        position = self.prompt_encoder.image_position_encoding().to(dtype)
        outputs: PromptOutputs = self.image_decoder(image_embeddings, sparse, position)
        return outputs

    def generate(
        self,
        semantic_tokens: torch.Tensor,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        stop_at_eos: bool = True,
    ) -> torch.Tensor:
        """Generate captions with a KV cache.

        Args:
            semantic_tokens: token of the chosen mask, float ``[P, C]``.
            max_new_tokens: maximum number of tokens; None for ``config.max_new_tokens``, which is
                also the upper limit.
            temperature: 0 for greedy decoding; above 0 tokens are drawn from the softmax.
            generator: random generator for the draws.
            stop_at_eos: pad finished rows, and stop when all are finished. False continues after
                EOS, like the public code.

        Returns:
            Ids int64 ``[P, text_seq_len - 1]``: BOS, the caption, padding.
        """
        limit = self.config.max_new_tokens
        count = limit if max_new_tokens is None else min(max_new_tokens, limit)
        return self.text_decoder.generate(
            semantic_tokens, count, temperature, generator, stop_at_eos
        )
