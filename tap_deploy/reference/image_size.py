"""Runs trained weights on pictures of another size by interpolating the position table."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tap_deploy.reference.model import TapModel
from tap_deploy.reference.state import meta_model

POSITIONS = "image_encoder.pos_embed.weight"


def at_image_size(model: TapModel, image_size: int) -> TapModel:
    """Return the model for pictures of another size; it shares all weights except the positions.

    Only the position table depends on the size. Attention stays within windows of the same number
    of tokens, so the relative position biases fit unchanged. Prompt points and the positions of the
    prompt decoder are fractions of the picture.

    Args:
        model: the trained model; returned itself if it already has this size.
        image_size: side of the model frame, pixels.

    Raises:
        InputError: the size is not a multiple of ``patch_size * window_size``, or exceeds the
            limits of ``meta_model``.
    """
    if image_size == model.config.image_size:
        return model
    config = model.config.at_image_size(image_size)
    resized, state = meta_model(config), dict(model.state_dict())
    state[POSITIONS] = resized_positions(state[POSITIONS], model.config.grid_size, config.grid_size)
    resized.load_state_dict(state, strict=True, assign=True)
    return resized.requires_grad_(False).eval()


def resized_positions(table: torch.Tensor, grid: int, new_grid: int) -> torch.Tensor:
    """Interpolate a table of grid positions, row by row: ``[grid**2, D]`` to ``[new_grid**2, D]``.

    Bicubic with half-pixel centres, antialiased when shrinking.
    """
    maps = table.T.unflatten(1, (grid, grid)).unsqueeze(0)  # [1, D, grid, grid]
    resized = F.interpolate(
        maps, size=(new_grid, new_grid), mode="bicubic", align_corners=False, antialias=True
    )
    return resized.squeeze(0).flatten(1).T.contiguous()
