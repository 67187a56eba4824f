"""Larger overlays: a small picture and its regions, scaled up before anything is drawn."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tap_deploy.config import PointLabel
from tap_deploy.prompts import Prompts

if TYPE_CHECKING:
    from tap_deploy.regions import Regions

MAX_SCALE = 16


def enlarged_picture(picture: Image.Image, scale: int) -> Image.Image:
    """Return a picture with ``scale`` times the sides."""
    size = (picture.width * scale, picture.height * scale)
    return picture.resize(size, Image.Resampling.LANCZOS)


def enlarged_regions(regions: Regions, scale: int) -> Regions:
    """Return the regions of a picture as those of the enlarged picture.

    Masks get smooth edges: what is drawn is where half of a smoothed mask is passed.
    """
    height, width = regions.image_height * scale, regions.image_width * scale
    return dataclasses.replace(
        regions,
        masks=_enlarged_masks(regions, width, height),
        rles=None,
        prompts=_enlarged_prompts(regions.prompts, scale),
        image_height=height,
        image_width=width,
    )


def _enlarged_masks(regions: Regions, width: int, height: int) -> npt.NDArray[np.bool_] | None:
    larger = np.empty((len(regions), height, width), np.bool_)
    for index, target in enumerate(larger):
        mask = regions.mask(index)
        if mask is None:
            return None
        levels = Image.fromarray(mask.astype(np.uint8) * 255)
        resized = levels.resize((width, height), Image.Resampling.BICUBIC)
        np.greater_equal(np.asarray(resized), 128, out=target)
    return larger


def _enlarged_prompts(prompts: Prompts, scale: int) -> Prompts:
    """Points are the middles of pixels; corners of boxes are where pixels begin and end."""
    is_point = np.isin(prompts.labels, (PointLabel.FOREGROUND, PointLabel.BACKGROUND))
    shift: npt.NDArray[Any] = np.where(is_point, (scale - 1) / 2, 0)[..., None]
    return Prompts(
        coords=(prompts.coords * scale + shift).astype(np.float32), labels=prompts.labels
    )
