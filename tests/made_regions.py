"""Hand-made regions, for the tests of the output formats."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from tap_deploy.masks import rle_from_mask
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions

HEIGHT, WIDTH = 20, 30


def made_up(**changes: Any) -> Regions:
    """Two regions: a rectangle prompted by a point, and one without a mask by a box."""
    masks = np.zeros((2, HEIGHT, WIDTH), np.bool_)
    masks[0, 5:9, 10:16] = True
    fields: dict[str, Any] = {
        "masks": masks,
        "iou_predictions": np.array([0.9, 0.25], np.float32),
        "mask_index": np.array([2, 0]),
        "concepts": [[("Bär", 0.75), ("dog", 0.125)], [("cup", 0.5)]],
        "captions": ["a brown bear", "a cup"],
        "caption_ids": np.array([[1, 7, 8, 2], [1, 9, 2, 499]]),
        "semantic_tokens": np.zeros((2, 8), np.float32),
        "semantic_embeddings": np.zeros((2, 12), np.float32),
        "low_res_masks": np.zeros((2, 4, 4), np.float32),
        "prompts": Prompts.concatenate(
            [Prompts.from_points([[[12, 6.5, 1]]]), Prompts.from_boxes([[1, 2, 9, 8]])]
        ),
        "image_height": HEIGHT,
        "image_width": WIDTH,
    }
    return Regions(**(fields | changes))


def empty() -> Regions:
    """No regions at all."""
    regions = made_up()
    cut = {
        field.name: value[:0]
        for field in dataclasses.fields(regions)
        if not isinstance(value := getattr(regions, field.name), int | None)
    }
    return made_up(**cut)


def with_rles(regions: Regions | None = None) -> Regions:
    """The same regions with run lengths in place of masks."""
    regions = regions or made_up()
    assert regions.masks is not None
    rles = [rle_from_mask(mask) for mask in regions.masks]
    return dataclasses.replace(regions, masks=None, rles=rles)


def with_masks(
    masks: npt.NDArray[np.bool_],
    names: list[str] | None = None,
    captions: list[str] | None = None,
) -> Regions:
    """Regions of masks bool [P, H, W], scored 0.9, 0.8, and so on."""
    count, height, width = masks.shape
    return Regions(
        masks=masks,
        iou_predictions=(0.9 - 0.1 * np.arange(count)).astype(np.float32),
        mask_index=np.zeros(count, np.int64),
        concepts=None if names is None else [[(name, 0.5)] for name in names],
        captions=captions,
        caption_ids=None,
        semantic_tokens=np.zeros((count, 8), np.float32),
        semantic_embeddings=np.zeros((count, 12), np.float32),
        low_res_masks=np.zeros((count, 4, 4), np.float32),
        prompts=Prompts.from_boxes([[0, 0, width, height]] * count),
        image_height=height,
        image_width=width,
    )
