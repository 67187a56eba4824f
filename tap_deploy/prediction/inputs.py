"""What callers give: pictures, encoded or not, and the prompts on them."""

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
    """A picture that went through the image encoder.

    embeddings: what the prompt decoder reads; on a GPU it stays there.
    frame: where the picture lies in the model frame.
    path: of its file; None where it was no file.
    """

    embeddings: Embeddings
    frame: Frame
    path: str | None = None

    @property
    def image_embeddings(self) -> np.ndarray:
        """The embeddings as float32 ``[1, C, grid, grid]``; from a GPU they are fetched."""
        return self.embeddings.numpy()


Picture = ImageSource | EncodedImage


def request_from(
    image: Picture, prompts: Prompts, image_size: int, options: PredictOptions
) -> Request:
    """Return picture and prompts, checked: that may fail, and needs no lane and no GPU.

    Raises:
        InputError: the picture cannot be used, a prompt lies outside of it, or there is no
            memory for the masks.
    """
    if isinstance(image, EncodedImage):
        images, embeddings, frame = None, image.embeddings, image.frame
        path = image.path
    else:
        embeddings = None
        images, frame = frame_image(image, image_size)
        path = path_of(image)
    if options.clip:
        prompts, moved = prompts.clip(frame.width, frame.height)
        if moved:
            logger.warning(
                "%s: clip moved %d of %d prompts into the picture",
                name_of(image),
                moved,
                len(prompts),
            )
    prompts.check(frame.width, frame.height)
    if options.masks is True:
        require_room_for_masks(len(prompts), frame.height, frame.width)
    return Request(prompts=prompts, frame=frame, images=images, embeddings=embeddings, path=path)


def blank_request(image_size: int, num_regions: int) -> Request:
    """Return a black picture in the model frame, with boxes around all of it."""
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
    """Return an item of ``predict_many`` with its prompts: its own, or those for all pictures.

    Raises:
        InputError: it is neither a picture nor such a pair, or has no prompts, or both kinds.
    """
    if not isinstance(item, tuple):
        return item, gather_prompts(None, None, shared)
    if len(item) != 2 or not isinstance(item[1], Prompts):
        raise InputError("item is a tuple; expected a picture, or a pair (picture, Prompts)")
    if shared is not None:
        raise InputError(
            "prompts came with the picture and for all pictures; pass one or the other"
        )
    return item


def require_many(images: object) -> None:
    """Raise InputError for what is one picture, where an iterable of pictures is expected."""
    one = isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, PictureFile))
    one = one or isinstance(images, (Image.Image, EncodedImage)) or hasattr(images, "read")
    one = one or (isinstance(images, np.ndarray) and images.ndim < 4)
    if one or not isinstance(images, Iterable):
        raise InputError(
            f"images is of type {type(images).__name__}; expected an iterable of pictures; for one "
            "picture call predict, or pass a list of one"
        )


def path_of(item: object) -> str | None:
    """Return the path of a picture, or of the picture in a pair with prompts; None without one."""
    image = item[0] if isinstance(item, tuple) and item else item
    image = image.source if isinstance(image, PictureFile) else image
    return os.fsdecode(image) if isinstance(image, str | os.PathLike) else None


def in_brackets(item: object) -> str:
    """Return the path of an item's picture for a message, in brackets; empty if it has none."""
    path = path_of(item)
    return "" if path is None else f" ({path!r})"


def gather_prompts(points: Any, boxes: Any, prompts: Prompts | None) -> Prompts:
    """Return the prompts of a call, however they were given.

    Raises:
        InputError: they were given not at all, twice, or in a form that prompts do not have.
    """
    if prompts is not None:
        if not isinstance(prompts, Prompts):
            raise InputError(f"prompts is a {type(prompts).__name__}; expected Prompts")
        if points is not None or boxes is not None:
            raise InputError("prompts were given beside points or boxes; pass one or the other")
        return prompts
    if points is None and boxes is None:
        raise InputError("no prompt: pass points, boxes or prompts")
    if boxes is None:
        return Prompts.from_points(points)
    if points is None:
        return Prompts.from_boxes(boxes)
    return Prompts.from_points_and_boxes(points, boxes)
