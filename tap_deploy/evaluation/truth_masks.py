"""True masks of annotations."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tap_deploy.errors import InputError, first_line
from tap_deploy.evaluation.json_files import Entry
from tap_deploy.evaluation.modules import eval_module, old_code

# A character of compressed run lengths, minus "0", is six bits: more follows, then five of the
# value; the highest of the last five is the sign.
_CODES, _MORE, _VALUE, _SIGN, _BITS = 0x3F, 0x20, 0x1F, 0x10, 5
_MOST_CODES = 7  # for 32 bits and the sign


def fills(counts: str, pixels: int) -> bool:
    """Whether compressed run lengths are well formed and add up to a number of pixels.

    pycocotools decodes others, too, and returns memory that nothing was written to.

    Args:
        counts: text of ``counts``: a number takes 1 to 7 characters of 5 bits each, the lowest
            first, and from the fourth number on is the difference to the last but one.
        pixels: height x width, below 2^32.
    """
    if not counts or not counts.isascii():
        return False
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - ord("0")
    if codes.min() < 0 or codes.max() > _CODES or codes[-1] & _MORE:
        return False
    last = np.flatnonzero(codes & _MORE == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last + 1 - first
    if lengths.max() > _MOST_CODES:
        return False
    places = np.arange(len(codes)) - np.repeat(first, lengths)
    runs = np.add.reduceat((codes & _VALUE) << _BITS * places, first)
    runs -= np.where(codes[last] & _SIGN, 1 << _BITS * lengths, 0)
    for start in (1, 2):
        runs[start::2] = np.cumsum(runs[start::2])
    return bool(runs.min() >= 0) and int(runs.sum()) == pixels


def truth_mask(annotation: Entry, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Return the mask of an annotation, bool [H, W].

    Raises:
        InputError: its polygons or run lengths cannot be read.
        MissingDependencyError: pycocotools is not installed.
    """
    coco_mask = eval_module("pycocotools.mask")
    segmentation = annotation["segmentation"]
    try:
        with old_code():
            if isinstance(segmentation, list):
                rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
            elif isinstance(segmentation["counts"], list):
                rle = coco_mask.frPyObjects(segmentation, height, width)
            else:
                rle = segmentation
            mask: npt.NDArray[np.bool_] = coco_mask.decode(rle).astype(np.bool_)
    except Exception as exc:  # the library raises anything
        raise InputError(
            f"the mask of annotation {annotation['id']} cannot be read: {first_line(exc)}; "
            "download the annotations again"
        ) from exc
    return mask
