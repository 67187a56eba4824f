"""Makes golden samples: synthetic inputs with the outputs of the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from tap_deploy.bundle.golden import GoldenSample
from tap_deploy.config import PointLabel, TapConfig
from tap_deploy.masks import select_mask_token
from tap_deploy.reference.model import TapModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSize:
    """Size of one sample.

    Attributes:
        images: number of pictures B.
        prompts: number of prompts P.
        points: number of points per prompt N.
    """

    images: int
    prompts: int
    points: int


# They cover a batch of pictures, a single prompt, a single point without padding, and many points
# per prompt. The first one is stored in the bundle.
SAMPLE_SIZES = (
    SampleSize(images=1, prompts=4, points=4),
    SampleSize(images=2, prompts=1, points=2),
    SampleSize(images=1, prompts=3, points=1),
    SampleSize(images=1, prompts=7, points=11),
)


def made_images(config: TapConfig, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return pictures with smooth shading, sharp edges and noise, uint8 ``[B, S, S, 3]``."""
    size = config.image_size
    y, x = np.mgrid[0:size, 0:size] / size
    images = []
    for _ in range(count):
        waves = rng.uniform(1, 9, (3, 2))
        shade = np.stack([np.sin(a * x * 6 + b * y * 6) for a, b in waves], axis=-1)  # [S, S, 3]
        for _ in range(6):
            cx, cy, radius = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9), rng.uniform(0.04, 0.2)
            shade[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = rng.uniform(-1, 1, 3)
        noisy = 127.5 + 100 * shade + rng.normal(0, 12, shade.shape)
        images.append(noisy.clip(0, 255).astype(np.uint8))
    return np.stack(images)


def made_prompts(
    config: TapConfig, size: SampleSize, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates float32 ``[P, N, 2]`` and labels int32 ``[P, N]``.

    Points and boxes alternate. Rows have different amounts of padding, and some have background
    points.
    """
    shape = (size.prompts, size.points)
    coords = rng.uniform(0, config.image_size, (*shape, 2)).astype(np.float32)
    labels = rng.choice([PointLabel.FOREGROUND, PointLabel.BACKGROUND], shape, p=[0.7, 0.3])
    for row in range(size.prompts):
        if row % 2 and size.points >= 2:
            corners = np.sort(coords[row, :2], axis=0)
            coords[row, :2] = corners
            labels[row, :2] = PointLabel.BOX_LEFT_TOP, PointLabel.BOX_RIGHT_BOTTOM
            used = 2 + row % max(1, size.points - 1)
        else:
            labels[row, 0] = PointLabel.FOREGROUND
            used = 1 + row % size.points
        coords[row, used:], labels[row, used:] = 0, PointLabel.PADDING
    return coords, labels.astype(np.int32)


@torch.inference_mode()
def golden_sample(model: TapModel, size: SampleSize, seed: int) -> GoldenSample:
    """Return inputs drawn from a seed, with the outputs of the reference."""
    rng = np.random.default_rng(seed)
    images = made_images(model.config, size.images, rng)
    coords, labels = made_prompts(model.config, size, rng)
    embeddings = model.encode_image(torch.from_numpy(images))
    outputs = model.decode_prompts(
        embeddings[:1], torch.from_numpy(coords), torch.from_numpy(labels)
    )
    mask_index = select_mask_token(outputs.iou_predictions.numpy(), labels)
    tokens = outputs.semantic_tokens[torch.arange(size.prompts), torch.from_numpy(mask_index)]
    ids = model.generate(tokens, stop_at_eos=False)
    logits = model.text_decoder(tokens, ids[:, :-1])
    return GoldenSample(
        images=images,
        image_embeddings=embeddings.numpy(),
        point_coords=coords,
        point_labels=labels,
        mask_index=mask_index,
        caption_ids=ids.numpy(),
        logits=logits.numpy(),
        **{name: value.numpy() for name, value in outputs._asdict().items()},
    )


def golden_samples(
    model: TapModel, on_sample: Callable[[GoldenSample], None] | None = None
) -> list[GoldenSample]:
    """Return one sample per entry of ``SAMPLE_SIZES``."""
    samples = []
    for seed, size in enumerate(SAMPLE_SIZES):
        samples.append(golden_sample(model, size, seed))
        if on_sample is not None:
            on_sample(samples[-1])
    return samples
