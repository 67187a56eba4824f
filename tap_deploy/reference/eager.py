"""PyTorch eager calls, as a baseline for the latency of the graphs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tap_deploy import graphs
from tap_deploy.reference.model import TapModel


def eager_calls(
    model: TapModel,
    *,
    images: np.ndarray,
    image_embeddings: np.ndarray,
    point_coords: np.ndarray,
    point_labels: np.ndarray,
    semantic_tokens: np.ndarray,
    num_tokens: int,
) -> dict[str, Callable[[], object]]:
    """Return a call per graph that does the same work in PyTorch.

    Args:
        model: the model, in evaluation mode, on the CPU.
        images: uint8 ``[1, S, S, 3]`` BGR, model frame.
        image_embeddings: float32 ``[1, C, grid, grid]``.
        point_coords: float32 ``[P, N, 2]``, model frame.
        point_labels: int32 ``[P, N]``.
        semantic_tokens: float32 ``[P, C]``.
        num_tokens: number of tokens to generate per caption, regardless of EOS.
    """
    prompts = [torch.from_numpy(a) for a in (image_embeddings, point_coords, point_labels)]
    pictures, tokens = torch.from_numpy(images), torch.from_numpy(semantic_tokens)

    @torch.inference_mode()
    def encode() -> object:
        return model.encode_image(pictures)

    @torch.inference_mode()
    def decode() -> object:
        return model.decode_prompts(*prompts)

    @torch.inference_mode()
    def caption() -> object:
        return model.generate(tokens, max_new_tokens=num_tokens, stop_at_eos=False)

    return {
        graphs.IMAGE_ENCODER: encode,
        graphs.PROMPT_DECODER: decode,
        graphs.TEXT_DECODER: caption,
    }
