"""True masks of annotations."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tap_deploy.errors import InputError, first_line
from tap_deploy.evaluation.json_files import Entry
from tap_deploy.evaluation.modules import eval_module, old_code


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
