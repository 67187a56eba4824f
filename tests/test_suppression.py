"""Filters of automatic segmentation against their definitions, mask by mask and pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest

from tap_deploy.masks import box_from_mask, mask_iou
from tap_deploy.prediction.suppression import (
    boxes_from_masks,
    packed,
    stability_scores,
    suppressed,
    unpacked,
)


@pytest.mark.parametrize("offset", [0.0, 0.3, 1.0])
def test_stability_is_the_iou_of_the_masks_of_both_thresholds(offset):
    logits = np.random.default_rng(0).normal(size=(6, 11, 7)).astype(np.float32)
    expected = [mask_iou(mask > offset, mask > -offset) for mask in logits]
    np.testing.assert_allclose(stability_scores(logits, offset), expected, rtol=1e-12)


def test_stability_of_a_mask_without_pixels_is_0():
    assert stability_scores(np.full((1, 3, 3), -5, np.float32), 1.0).tolist() == [0]
    assert stability_scores(np.zeros((0, 3, 3), np.float32), 1.0).tolist() == []


def blobs(count, height=23, width=17):
    """Rectangles with ragged contents, some of them nearly equal, and an empty mask."""
    rng = np.random.default_rng(1)
    masks = np.zeros((count, height, width), np.bool_)
    for index in range(0, count - 1, 2):
        x0, y0 = rng.integers(0, [width - 4, height - 4])
        x1, y1 = rng.integers([x0 + 3, y0 + 3], [width, height])
        for mask in masks[index : index + 2]:
            mask[y0:y1, x0:x1] = rng.random((y1 - y0, x1 - x0)) < 0.9
    return masks


def test_boxes_are_those_of_each_mask():
    masks = blobs(9)
    expected = [[x, y, x + w, y + h] for x, y, w, h in map(box_from_mask, masks)]
    assert boxes_from_masks(masks).tolist() == expected
    assert boxes_from_masks(masks[:0]).shape == (0, 4)


def test_packed_masks_come_back():
    masks = blobs(9)
    assert packed(masks).dtype == np.uint16
    np.testing.assert_array_equal(unpacked(packed(masks), *masks.shape[1:]), masks)
    assert packed(masks).nbytes == 9 * 50  # 391 bits are 49 bytes, in words of 2 bytes
    assert unpacked(packed(masks[:0]), 23, 17).shape == (0, 23, 17)


def box_mask(box, height=23, width=17):
    mask = np.zeros((height, width), np.bool_)
    x0, y0, x1, y1 = box.astype(int)
    mask[y0:y1, x0:x1] = True
    return mask


def brute_force(masks, order, box_thresh, mask_thresh):
    boxes = boxes_from_masks(masks)
    kept = []
    for index in order:
        box_ious = [mask_iou(box_mask(boxes[index]), box_mask(boxes[best])) for best in kept]
        mask_ious = [mask_iou(masks[index], masks[best]) for best in kept]
        if all(iou <= box_thresh for iou in box_ious) and all(
            iou <= mask_thresh for iou in mask_ious
        ):
            kept.append(index)
    return kept


@pytest.mark.parametrize("box_thresh", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("mask_thresh", [0.2, 0.5, 1.0])
def test_suppression_equals_brute_force(box_thresh, mask_thresh):
    masks = blobs(60)[:-2]  # without the empty one, which the filters drop
    order = np.random.default_rng(2).permutation(len(masks))
    found = suppressed(boxes_from_masks(masks), packed(masks), order, box_thresh, mask_thresh)
    assert found.tolist() == brute_force(masks, order, box_thresh, mask_thresh)
    assert 1 < len(found) <= len(masks)
    assert (len(found) == len(masks)) == (box_thresh == mask_thresh == 1.0)


def test_masks_decide_where_boxes_do_not():
    """A far speck enlarges the box of a duplicate; a ring and its filling share one box."""
    disc, speckled, ring = np.zeros((3, 20, 20), np.bool_)
    disc[2:8, 2:8] = True
    speckled[2:8, 2:8] = True
    speckled[19, 19] = True
    ring[2:8, 2:8] = True
    ring[3:7, 3:7] = False
    masks = np.stack([disc, speckled, ring])
    arguments = boxes_from_masks(masks), packed(masks), np.arange(3)
    assert suppressed(*arguments, 0.7, 1.0).tolist() == [0, 1]  # boxes alone
    assert suppressed(*arguments, 1.0, 0.7).tolist() == [0, 2]  # masks alone
    assert suppressed(*arguments, 0.7, 0.7).tolist() == [0]


def test_nothing_to_suppress():
    none = np.zeros((0, 4, 4), np.bool_)
    empty = np.arange(0)
    assert suppressed(boxes_from_masks(none), packed(none), empty, 0.7, 0.5).tolist() == []
