"""Validation of a caller's pictures and prompts, and their conversion to requests."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from tap_deploy.chunks import require_room_for_masks
from tap_deploy.errors import InputError
from tap_deploy.image import Frame, frame_image
from tap_deploy.pictures.source import ImageSource, PictureFile, name_of
from tap_deploy.prediction.answers import Request
from tap_deploy.prediction.options import PredictOptions
from tap_deploy.prompts import Prompts
from tap_deploy.sessions.pipeline import Embeddings

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EncodedImage:
    """A picture after the image encoder.

    Attributes:
        embeddings: image embeddings; they stay on the GPU if computed there.
        frame: placement of the picture in the model frame.
        path: path of the picture; None if it was not a file.
    """

    embeddings: Embeddings
    frame: Frame
    path: str | None = None

    @property
    def image_embeddings(self) -> np.ndarray:
        """Embeddings as float32 ``[1, C, grid, grid]``, copied from the GPU if necessary."""
        return self.embeddings.numpy()


Picture = ImageSource | EncodedImage


def request_from(
    image: Picture, prompts: Prompts, image_size: int, options: PredictOptions
) -> Request:
    """Read a picture, validate its prompts, and return both; needs no lane and no GPU.

    Raises:
        InputError: invalid picture, a picture encoded at another image size, invalid prompts, or
            not enough memory for the masks.
    """
    if isinstance(image, EncodedImage):
        images, embeddings, frame = None, image.embeddings, image.frame
        if frame.image_size != image_size:
            raise InputError(
                f"this picture was encoded at image size {frame.image_size}; expected "
                f"{image_size}; encode it with this predictor"
            )
        path = image.path
    else:
        embeddings = None
        images, frame = frame_image(image, image_size)
        path = path_of(image)
    if options.clip:
        prompts, moved = prompts.clip(frame.width, frame.height)
        if moved:
            logger.warning(
                "%s: clipped %d of %d prompts to the picture",
                name_of(image),
                moved,
                len(prompts),
            )
    prompts.check(frame.width, frame.height)
    if options.masks is True:
        require_room_for_masks(len(prompts), frame.height, frame.width)
    return Request(prompts=prompts, frame=frame, images=images, embeddings=embeddings, path=path)


def blank_request(image_size: int, num_regions: int) -> Request:
    """Return a request of a black picture with ``num_regions`` boxes around the whole frame."""
    boxes = np.tile([0, 0, image_size - 1, image_size - 1], (num_regions, 1))
    return Request(
        prompts=Prompts.from_boxes(boxes),
        frame=Frame.for_image(image_size, image_size, image_size),
        images=np.zeros((1, image_size, image_size, 3), np.uint8),
        embeddings=None,
    )


def picture_and_prompts(
    item: Picture | tuple[Picture, Prompts], shared: Prompts | None
) -> tuple[Picture, Prompts]:
    """Split an item of ``predict_many`` into picture and prompts (its own or the shared ones).

    Raises:
        InputError: the item is neither a picture nor a pair, or has no prompts, or there are both
            own and shared prompts.
    """
    if not isinstance(item, tuple):
        return item, gather_prompts(None, None, shared)
    if len(item) != 2 or not isinstance(item[1], Prompts):
        raise InputError("item is a tuple; expected a picture, or a pair (picture, Prompts)")
    if shared is not None:
        raise InputError(
            "prompts were given both with the picture and for all pictures; pass only one of them"
        )
    return item


def require_many(images: object) -> None:
    """Raise InputError if ``images`` is a single picture instead of an iterable of pictures."""
    one = isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, PictureFile))
    one = one or isinstance(images, (Image.Image, EncodedImage)) or hasattr(images, "read")
    one = one or (isinstance(images, np.ndarray) and images.ndim < 4)
    if one or not isinstance(images, Iterable):
        raise InputError(
            f"images is of type {type(images).__name__}; expected an iterable of pictures; for one "
            "picture call predict, or pass a list of one"
        )


def path_of(item: object) -> str | None:
    """Return the path of a picture or of a pair's picture; None if it was not a file."""
    image = item[0] if isinstance(item, tuple) and item else item
    image = image.source if isinstance(image, PictureFile) else image
    return os.fsdecode(image) if isinstance(image, str | os.PathLike) else None


def in_brackets(item: object) -> str:
    """Return the path of an item's picture in brackets, for messages; empty without a path."""
    path = path_of(item)
    return "" if path is None else f" ({path!r})"


def gather_prompts(points: Any, boxes: Any, prompts: Prompts | None) -> Prompts:
    """Build ``Prompts`` from the arguments of a call.

    Raises:
        InputError: no prompts, both ``prompts`` and points or boxes, or invalid values.
    """
    if prompts is not None:
        if not isinstance(prompts, Prompts):
            raise InputError(f"prompts is a {type(prompts).__name__}; expected Prompts")
        if points is not None or boxes is not None:
            raise InputError("prompts were given with points or boxes; pass only one of them")
        return prompts
    if points is None and boxes is None:
        raise InputError("no prompt: pass points, boxes or prompts")
    if boxes is None:
        return Prompts.from_points(points)
    if points is None:
        return Prompts.from_boxes(boxes)
    return Prompts.from_points_and_boxes(points, boxes)
