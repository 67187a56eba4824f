"""Converts regions to ``supervision.Detections``, for its annotators, filters and trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tap_deploy.chunks import require_room_for_masks
from tap_deploy.formats.coco import category_id
from tap_deploy.formats.described import DescribedRegions
from tap_deploy.masks import Rle, box_from_rle, mask_from_rle
from tap_deploy.optional_modules import require_module

if TYPE_CHECKING:
    import supervision


def detections(
    regions: DescribedRegions, rles: Sequence[Rle], category_ids: Mapping[str, int] | None
) -> supervision.Detections:
    """Return detections, see ``Regions.to_supervision``; ``rles`` are the masks of the regions."""
    module = require_module("supervision", "Regions.to_supervision", "supervision")
    boxes = np.array([box_from_rle(rle) for rle in rles], np.float32).reshape(-1, 4)
    masks = regions.masks
    if masks is None:
        require_room_for_masks(len(rles), regions.image_height, regions.image_width)
        masks = np.zeros((len(rles), regions.image_height, regions.image_width), np.bool_)
        for mask, rle in zip(masks, rles, strict=True):
            mask[:] = mask_from_rle(rle)
    found: supervision.Detections = module.Detections(
        xyxy=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
        mask=masks,
        confidence=regions.iou_predictions,
        class_id=np.array(_class_ids(regions, category_ids), np.int64),
        data=_words(regions),
    )
    return found


def _class_ids(regions: DescribedRegions, category_ids: Mapping[str, int] | None) -> list[int]:
    if category_ids is not None:
        return [category_id(regions, index, category_ids) for index in range(len(regions))]
    ids: dict[str | None, int] = {}
    return [ids.setdefault(regions.name(index), len(ids)) for index in range(len(regions))]


def _words(regions: DescribedRegions) -> dict[str, Any]:
    words: dict[str, Any] = {}
    if regions.concepts is not None:
        names = [regions.name(index) or "" for index in range(len(regions))]
        words["class_name"] = np.array(names, np.str_)
    if regions.captions is not None:
        words["caption"] = np.array(regions.captions, np.str_)
    return words
