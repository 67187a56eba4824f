"""Prompts to train on: a noisy box or a point first, then points where the mask was wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from tap_deploy.config import PointLabel
from tap_deploy.prompts import Prompts
from tap_deploy.training.objective.losses import MASK_THRESHOLD


def first_prompts(
    masks: Sequence[npt.NDArray[np.bool_]],
    boxes: Sequence[npt.NDArray[np.float32]],
    box_noise: float,
    rng: np.random.Generator,
) -> Prompts:
    """Return a box with noise or a point of the mask for each of P regions, half and half.

    Args:
        masks: bool [H, W] each, not empty.
        boxes: float32 [4] XYXY each, pixels.
        box_noise: each edge moves by up to this part of the side of the box, evenly
            distributed, but stays in the picture.
        rng: random state.

    Returns:
        N is 2: two corners, or a point and a padding point.
    """
    rows = []
    for mask, box, use_box in zip(masks, boxes, rng.random(len(masks)) < 0.5, strict=True):
        one = (
            Prompts.from_boxes([noisy_box(box, mask.shape, box_noise, rng)])
            if use_box
            else Prompts.from_points([[[*point_inside(mask, rng), PointLabel.FOREGROUND]]])
        )
        rows.append(one)
    return Prompts.concatenate(rows)


def noisy_box(
    box: npt.NDArray[np.float32],
    picture_shape: tuple[int, ...],
    box_noise: float,
    rng: np.random.Generator,
) -> npt.NDArray[np.float64]:
    """Return a box whose edges were moved, float64 [4] XYXY; see ``first_prompts``."""
    height, width = picture_shape
    sides = np.tile(box[2:] - box[:2], 2)
    moved = box + rng.uniform(-box_noise, box_noise, 4) * sides
    return moved.clip(0, [width, height, width, height])


def point_inside(mask: npt.NDArray[np.bool_], rng: np.random.Generator) -> tuple[float, float]:
    """Return a random pixel of a mask bool [H, W], as x and y."""
    pixels = np.flatnonzero(mask)
    y, x = divmod(int(pixels[rng.integers(len(pixels))]), mask.shape[1])
    return float(x), float(y)


def extra_points(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    max_points: int,
    sketch_share: float,
    image_size: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return up to ``max_points`` points for each of P regions, for the second stage.

    A region's points lie where mask and target differ: foreground points on what was missed,
    background points on what was taken wrongly. Where nothing differs, and for a share of the
    regions in any case, they are foreground points of the target, like those of a sketch. How
    many is drawn evenly from 1 to a limit, itself drawn once a call from 1 to ``max_points``;
    rows are filled up to it with padding.

    Args:
        logits: float ``[P, S, S]``, the mask of the first stage.
        targets: float ``[P, S, S]``, 0..1, see ``mask_losses``.
        max_points: the highest limit.
        sketch_share: share of the regions, 0..1, whose points come from the target.
        image_size: side of the model frame in pixels.
        generator: random state on the CPU, so that a run is the same on every device.

    Returns:
        coords float32 ``[P, n, 2]`` XY, pixels of the model frame, centres of low-resolution
        pixels; labels int64 ``[P, n]``.
    """
    true = targets.flatten(1) > MASK_THRESHOLD  # [P, S * S]
    wrong = (logits.detach().flatten(1) > 0) != true
    device, num_regions, size = logits.device, len(logits), logits.shape[-1]
    sketched = torch.rand(num_regions, generator=generator).to(device) < sketch_share
    region = torch.where((sketched | ~wrong.any(dim=1)).unsqueeze(1), true, wrong)
    limit = int(torch.randint(1, max_points + 1, (), generator=generator))
    counts = torch.randint(1, limit + 1, (num_regions, 1), generator=generator).to(device)
    # The highest of random keys are a draw without replacement.
    keys = torch.rand(region.shape, generator=generator).to(device) * region
    best, places = keys.topk(limit, dim=1)  # [P, limit]
    real = (torch.arange(limit, device=device) < counts) & (best > 0)
    labels = torch.where(true.gather(1, places), PointLabel.FOREGROUND, PointLabel.BACKGROUND)
    cell = image_size / size
    xy = torch.stack([places % size, places // size], dim=2) * cell + (cell - 1) / 2
    coords = torch.where(real.unsqueeze(2), xy, 0.0)
    return coords, torch.where(real, labels, PointLabel.PADDING)
