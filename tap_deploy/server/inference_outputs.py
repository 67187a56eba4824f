"""Outputs of the Open Inference Protocol: what there is, what is asked for, their values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tap_deploy.errors import InputError
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions
from tap_deploy.server.options import MIB
from tap_deploy.server.tensors import BYTES, TensorSpec, bytes_array

# Of the output ``masks`` of one request. JSON takes 20 times as much memory while it is made.
MAX_MASK_BYTES, MAX_JSON_MASK_BYTES = 64 * MIB, 4 * MIB
MASKS, CAPTIONS = "masks", "captions"
OUTPUTS = (
    TensorSpec(name=MASKS, datatype="BOOL", shape=(-1, -1, -1)),
    TensorSpec(name="bboxes", datatype="INT32", shape=(-1, 4)),
    TensorSpec(name="iou_predictions", datatype="FP32", shape=(-1,)),
    TensorSpec(name="names", datatype=BYTES, shape=(-1, -1)),
    TensorSpec(name="probabilities", datatype="FP32", shape=(-1, -1)),
    TensorSpec(name=CAPTIONS, datatype=BYTES, shape=(-1,)),
)
NEED_MASKS = (MASKS, "bboxes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WantedOutput:
    """An output to answer with.

    Attributes:
        spec: its name, datatype and shape.
        binary: whether it goes after the JSON, as binary data.
    """

    spec: TensorSpec
    binary: bool


def check_room(prompts: Prompts, width: int, height: int, wanted: Sequence[WantedOutput]) -> None:
    """Check that the masks of an answer are not too large.

    Raises:
        InputError: they are.
    """
    size = len(prompts) * width * height
    for output in wanted:
        most = MAX_MASK_BYTES if output.binary else MAX_JSON_MASK_BYTES
        if output.spec.name == MASKS and size > most:
            remedy = "fewer regions" if output.binary else "binary data"
            raise InputError(
                f"output {MASKS}: {size} values; expected at most {most}; ask for {remedy}, or for "
                "run lengths under /v1"
            )


def output_array(name: str, regions: Regions) -> npt.NDArray[Any]:
    """Return an output of the answer."""
    concepts = regions.concepts or []
    match name:
        case "masks":
            masks = np.empty((len(regions), regions.image_height, regions.image_width), np.bool_)
            for index, mask in enumerate(masks):
                mask[:] = regions.mask(index)
            return masks
        case "bboxes":
            boxes = [regions.box(index) for index in range(len(regions))]
            return np.array(boxes, np.int32).reshape(-1, 4)
        case "names":
            names = [name.encode() for row in concepts for name, _ in row]
            return bytes_array(names, (len(regions), -1))
        case "probabilities":
            return np.array([[chance for _, chance in row] for row in concepts], np.float32)
        case "captions":
            return bytes_array([text.encode() for text in regions.captions or []], (-1,))
        case _:
            return regions.iou_predictions


def available_outputs(*, names: bool, captions: bool) -> list[TensorSpec]:
    """Return the outputs of a model with or without names and captions."""
    without = set() if names else {"names", "probabilities"}
    without |= set() if captions else {CAPTIONS}
    return [spec for spec in OUTPUTS if spec.name not in without]
