"""Scales a picture and its regions before drawing."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tap_deploy.config import PointLabel
from tap_deploy.prompts import Prompts
from tap_deploy.visualize.drawing import Drawing, Mask, Masks

MAX_SCALE = 16

_REDUCING_GAP = 1.0  # shrinks large masks in less time; has no effect on enlarging


def scaled_size(width: int, height: int, scale: float) -> tuple[int, int]:
    """Return width and height of a picture after scaling, pixels, at least 1."""
    return max(1, round(width * scale)), max(1, round(height * scale))


def scaled_picture(picture: Image.Image, scale: float) -> Image.Image:
    """Return a picture scaled by ``scale``."""
    size = scaled_size(picture.width, picture.height, scale)
    return picture.resize(size, Image.Resampling.LANCZOS)


def scaled_drawing(drawing: Drawing, scale: float) -> Drawing:
    """Return the regions scaled by ``scale``.

    Mask edges become smooth: masks are resized bicubically and thresholded at one half.
    """
    width, height = scaled_size(drawing.width, drawing.height, scale)
    return dataclasses.replace(
        drawing,
        height=height,
        width=width,
        masks=None if drawing.masks is None else _scaled_masks(drawing.masks, width, height),
        prompts=_scaled_prompts(drawing.prompts, scale),
    )


def _scaled_masks(masks: Masks, width: int, height: int) -> list[Mask]:
    scaled = []
    for mask in masks:
        levels = Image.fromarray(mask.astype(np.uint8) * 255)
        resized = levels.resize(
            (width, height), Image.Resampling.BICUBIC, reducing_gap=_REDUCING_GAP
        )
        scaled.append(np.asarray(resized) >= 128)
    return scaled


def _scaled_prompts(prompts: Prompts, scale: float) -> Prompts:
    """Scale prompts; points lie at pixel centres, box corners at pixel edges."""
    is_point = np.isin(prompts.labels, (PointLabel.FOREGROUND, PointLabel.BACKGROUND))
    shift: npt.NDArray[Any] = np.where(is_point, (scale - 1) / 2, 0)[..., None]
    return Prompts(
        coords=(prompts.coords * scale + shift).astype(np.float32), labels=prompts.labels
    )
