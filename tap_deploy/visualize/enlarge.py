"""Scales up a small picture and its regions before drawing."""

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


def enlarged_picture(picture: Image.Image, scale: int) -> Image.Image:
    """Return a picture scaled up by ``scale``."""
    size = (picture.width * scale, picture.height * scale)
    return picture.resize(size, Image.Resampling.LANCZOS)


def enlarged_drawing(drawing: Drawing, scale: int) -> Drawing:
    """Return the regions scaled up by ``scale``.

    Mask edges become smooth: masks are resized bicubically and thresholded at one half.
    """
    height, width = drawing.height * scale, drawing.width * scale
    return dataclasses.replace(
        drawing,
        height=height,
        width=width,
        masks=None if drawing.masks is None else _enlarged_masks(drawing.masks, width, height),
        prompts=_enlarged_prompts(drawing.prompts, scale),
    )


def _enlarged_masks(masks: Masks, width: int, height: int) -> list[Mask]:
    larger = []
    for mask in masks:
        levels = Image.fromarray(mask.astype(np.uint8) * 255)
        resized = levels.resize((width, height), Image.Resampling.BICUBIC)
        larger.append(np.asarray(resized) >= 128)
    return larger


def _enlarged_prompts(prompts: Prompts, scale: int) -> Prompts:
    """Scale prompts up; points lie at pixel centres, box corners at pixel edges."""
    is_point = np.isin(prompts.labels, (PointLabel.FOREGROUND, PointLabel.BACKGROUND))
    shift: npt.NDArray[Any] = np.where(is_point, (scale - 1) / 2, 0)[..., None]
    return Prompts(
        coords=(prompts.coords * scale + shift).astype(np.float32), labels=prompts.labels
    )
