"""Boxes of data sets as prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tap_deploy.image import Frame
from tap_deploy.prompts import Prompts


def corners(boxes: Sequence[Sequence[float]]) -> npt.NDArray[np.float32]:
    """Return boxes [x, y, width, height] as XYXY, float32 [P, 4]."""
    wide = np.array(boxes, np.float64).reshape(-1, 4)
    wide[:, 2:] += wide[:, :2]
    return wide.astype(np.float32)


def prompts_from_boxes(boxes: Sequence[Sequence[float]], frame: Frame) -> Prompts:
    """Return boxes [x, y, width, height] in pixels as prompts.

    Corners outside the picture are moved to its border: annotations and detectors round. Boxes
    without area, which data sets contain, are made as thin as float32 can tell.
    """
    low, high = np.split(corners(boxes), 2, axis=1)
    size = np.array([frame.width, frame.height], np.float32)
    low = low.clip(0, np.nextafter(size, np.float32(0)))
    high = np.maximum(high.clip(0, size), np.nextafter(low, np.float32(np.inf)))
    return Prompts.from_boxes(np.concatenate([low, high], axis=1))
