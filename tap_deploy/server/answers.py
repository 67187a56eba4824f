"""The bodies of answers: their schema, and their conversion from ``Regions``."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, Field

from tap_deploy.regions import Regions
from tap_deploy.server.requests import AnswerOptions


class ProblemAnswer(BaseModel):
    """An RFC 9457 problem."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str


class Limits(BaseModel):
    """The largest request."""

    pixels: int
    body_bytes: int
    regions: int
    points_per_side: int


class ModelAnswer(BaseModel):
    """The model, and how it is run."""

    name: str
    version: str = Field(description="Of tap_deploy.")
    backend: str
    precision: str
    image_size: int = Field(description="Side of the model frame, pixels.")
    concepts: int | None = Field(description="Number of names to choose from; null without names.")
    captions: bool
    limits: Limits


class ImageAnswer(BaseModel):
    """A picture that is kept encoded."""

    image_id: str
    width: int = Field(description="Of the upright picture, pixels.")
    height: int


class Size(BaseModel):
    """Size of a picture, pixels."""

    height: int
    width: int


class Concept(BaseModel):
    """A name and its probability."""

    name: str
    probability: float | None


class RunLengths(BaseModel):
    """Uncompressed COCO run lengths."""

    size: list[int] = Field(description="[height, width], pixels.")
    counts: list[int] = Field(description="Runs by columns, background first.")


class Region(BaseModel):
    """What is known of a region."""

    index: int
    points: list[list[float]] = Field(description="[x, y, label]; 2 and 3 are corners of a box.")
    iou_prediction: float | None
    mask_index: int
    concepts: list[Concept] | None
    caption: str | None
    caption_ids: list[int] | None
    bbox: list[int] | None = Field(description="Of the mask: [x, y, width, height], pixels.")
    area: int | None = Field(description="Of the mask, pixels.")
    segmentation: RunLengths | list[list[float]] | None = Field(
        description="Run lengths, or COCO polygons [[x0, y0, x1, y1, …], …]."
    )
    mask_png: str | None = Field(
        None, description="Black and white PNG of the size of the picture, in base64."
    )


class RegionsAnswer(BaseModel):
    """The regions of a picture."""

    image: Size
    regions: list[Region]


def regions_answer(regions: Regions, options: AnswerOptions) -> dict[str, Any]:
    """Return a ``RegionsAnswer`` as plain JSON types.

    Raises:
        MissingDependencyError: polygons were asked for, and shapely is not installed.
    """
    answer = regions.to_dict()
    if options.masks == "polygons":
        outlines = regions.to_polygons(options.polygon_tolerance)
        for region, outline in zip(answer["regions"], outlines, strict=True):
            region["segmentation"] = outline
    elif options.masks == "png":
        for region in answer["regions"]:
            region["segmentation"] = None
            region["mask_png"] = base64.b64encode(png_of(regions, region["index"])).decode()
    return answer


def png_of(regions: Regions, index: int) -> bytes:
    """Return the mask of a region as a PNG of 1 bit, white inside."""
    mask: npt.NDArray[np.bool_] | None = regions.mask(index)
    assert mask is not None
    content = io.BytesIO()
    Image.fromarray(mask).save(content, "PNG")
    return content.getvalue()
