"""Samples training prompts: first a noisy box or a point, then points on mask errors."""

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
    """Return a noisy box or a point of the mask for each of P regions, with equal probability.

    Args:
        masks: non-empty masks, bool [H, W] each.
        boxes: float32 [4] XYXY each, pixels.
        box_noise: maximum shift of each edge as a fraction of the side of the box; shifts are
            uniform and clipped to the picture.
        rng: random generator.

    Returns:
        Prompts with N = 2 points: two corners, or a point and padding.
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
    """Return a box with shifted edges, float64 [4] XYXY; see ``first_prompts``."""
    height, width = picture_shape
    sides = np.tile(box[2:] - box[:2], 2)
    moved = box + rng.uniform(-box_noise, box_noise, 4) * sides
    return moved.clip(0, [width, height, width, height])


def point_inside(mask: npt.NDArray[np.bool_], rng: np.random.Generator) -> tuple[float, float]:
    """Return a random pixel of a mask bool [H, W] as (x, y)."""
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

    Points lie where mask and target differ: foreground points on false negatives, background
    points on false positives. If nothing differs, and for a fraction ``sketch_share`` of the
    regions, they are foreground points of the target, as in a sketch. The number of points is
    uniform from 1 to a limit, which is drawn once per call from 1 to ``max_points``; rows are
    padded to that limit.

    Args:
        logits: masks of the first stage, float ``[P, S, S]``.
        targets: see ``mask_losses``, float ``[P, S, S]``, 0..1.
        max_points: largest limit.
        sketch_share: fraction of regions, 0..1, whose points are drawn from the target.
        image_size: side of the model frame, pixels.
        generator: random generator on the CPU, so that runs are the same on every device.

    Returns:
        Coordinates float32 ``[P, n, 2]`` XY, pixels of the model frame, at centres of
        low-resolution pixels; and labels int64 ``[P, n]``.
    """
    true = targets.flatten(1) > MASK_THRESHOLD  # [P, S * S]
    wrong = (logits.detach().flatten(1) > 0) != true
    device, num_regions, size = logits.device, len(logits), logits.shape[-1]
    sketched = torch.rand(num_regions, generator=generator).to(device) < sketch_share
    region = torch.where((sketched | ~wrong.any(dim=1)).unsqueeze(1), true, wrong)
    limit = int(torch.randint(1, max_points + 1, (), generator=generator))
    counts = torch.randint(1, limit + 1, (num_regions, 1), generator=generator).to(device)
    # The largest random keys are a draw without replacement.
    keys = torch.rand(region.shape, generator=generator).to(device) * region
    best, places = keys.topk(limit, dim=1)  # [P, limit]
    real = (torch.arange(limit, device=device) < counts) & (best > 0)
    labels = torch.where(true.gather(1, places), PointLabel.FOREGROUND, PointLabel.BACKGROUND)
    cell = image_size / size
    xy = torch.stack([places % size, places // size], dim=2) * cell + (cell - 1) / 2
    coords = torch.where(real.unsqueeze(2), xy, 0.0)
    return coords, torch.where(real, labels, PointLabel.PADDING)
