"""Filters of automatic segmentation: stability, bounding boxes, non-maximum suppression."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint16]  # packed masks [P, words]
Boxes = npt.NDArray[np.float64]  # [P, 4] XYXY

_BITS_SET = np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1)
_BITS_SET = _BITS_SET.sum(axis=1, dtype=np.uint8)  # number of ones in each 16-bit word


def stability_scores(logits: npt.NDArray[np.floating], offset: float) -> npt.NDArray[np.float64]:
    """Return the IoU of each mask cut ``offset`` above and ``offset`` below 0, float64 [P].

    The mask above lies within the one below, so the IoU is the ratio of their areas. It is 0 if
    no logit exceeds ``-offset``.

    Args:
        logits: mask logits, float [P, h, w].
        offset: distance of both thresholds from 0, in logits.
    """
    small = np.count_nonzero(logits > offset, axis=(1, 2))
    large = np.count_nonzero(logits > -offset, axis=(1, 2))
    scores: npt.NDArray[np.float64] = small / np.maximum(large, 1)
    return scores


def boxes_from_masks(masks: npt.NDArray[np.bool_]) -> Boxes:
    """Return the bounding box of each mask bool [P, h, w], float64 [P, 4] XYXY.

    Coordinates are those of the edges of the cells; an empty mask gives zeros.
    """
    ends = []
    for axis in (1, 2):  # columns reached, then rows reached
        reached: npt.NDArray[np.bool_] = np.any(masks, axis=axis)
        size, some = reached.shape[1], reached.any(axis=1)
        ends += [
            np.where(some, reached.argmax(axis=1), 0),
            np.where(some, size - reached[:, ::-1].argmax(axis=1), 0),
        ]
    x0, x1, y0, y1 = ends
    return np.stack([x0, y0, x1, y1], axis=1).astype(np.float64)


def packed(masks: npt.NDArray[np.bool_]) -> Bits:
    """Return masks bool [P, h, w] as bits, uint16 [P, words]; padded with zeros."""
    count, height, width = masks.shape
    packs = np.packbits(masks.reshape(count, height * width), axis=1)
    return np.ascontiguousarray(np.pad(packs, ((0, 0), (0, packs.shape[1] % 2)))).view(np.uint16)


def unpacked(bits: Bits, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Return the masks bool [P, height, width] that ``packed`` took."""
    flat = np.unpackbits(bits.view(np.uint8), axis=1, count=height * width)
    return flat.reshape(len(bits), height, width).view(np.bool_)


def suppressed(
    boxes: Boxes,
    bits: Bits,
    order: npt.NDArray[np.intp],
    box_thresh: float,
    mask_thresh: float,
) -> npt.NDArray[np.intp]:
    """Return the masks that remain after non-maximum suppression, best first.

    Each mask of ``order`` that is still there removes all later ones whose box has an IoU above
    ``box_thresh`` with its own, or whose mask has an IoU above ``mask_thresh``.

    Args:
        boxes: box around each mask, float64 [P, 4] XYXY.
        bits: masks on a common raster, from ``packed``.
        order: indices of the masks, best first.
        box_thresh: largest IoU of two boxes.
        mask_thresh: largest IoU of two masks.
    """
    areas = _BITS_SET[bits].sum(axis=1, dtype=np.int64)
    kept = []
    left = order
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        inside, ious = _box_overlaps(boxes[best], boxes[left])
        left, inside = left[ious <= box_thresh], inside[ious <= box_thresh]
        smaller, larger = np.minimum(areas[left], areas[best]), np.maximum(areas[left], areas[best])
        # The IoU is at most the ratio of the areas, and 0 where the boxes do not meet.
        near = np.flatnonzero((inside > 0) & (smaller > mask_thresh * larger))
        common = _BITS_SET[bits[left[near]] & bits[best]].sum(axis=1, dtype=np.int64)
        union = areas[left[near]] + areas[best] - common
        left = np.delete(left, near[common > mask_thresh * union])
    return np.array(kept, np.intp)


def _box_overlaps(
    box: npt.NDArray[np.float64], others: Boxes
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the area that a box [4] shares with each of others [P, 4], and the IoU."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    common = (high - low).clip(0).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1)
    union = (box[2:] - box[:2]).prod() + areas - common
    return common, common / np.where(union > 0, union, 1)
