"""Layout of a scene: positions and visible parts of its objects."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tap_deploy.training.scenes.captions import Box, CaptionParts, parts_from_boxes
from tap_deploy.training.scenes.sprites import Sprite

_NOBODY = -1
_MIN_VISIBLE_SHARE = 0.55  # visible fraction below which an object is hard to name
_MIN_VISIBLE_PIXELS = 300  # in a picture of 256 x 256


class Layout:
    """Stacked objects, the last one on top.

    Attributes:
        sprites: the objects, bottom to top.
        corners: (left, top) of each sprite, pixels; sprites may extend beyond the picture.
        parts: caption parts of each object, without the colour.
    """

    def __init__(self, image_size: int) -> None:
        self.sprites: list[Sprite] = []
        self.corners: list[tuple[int, int]] = []
        self.parts: list[CaptionParts] = []
        self._boxes: list[Box] = []
        self._size = image_size
        self._owner = np.full((image_size, image_size), _NOBODY, np.int8)
        self._min_pixels = _MIN_VISIBLE_PIXELS * (image_size / 256) ** 2

    def mask(self, index: int) -> npt.NDArray[np.bool_]:
        """Return the visible part of an object, bool [image_size, image_size]."""
        mask: npt.NDArray[np.bool_] = self._owner == index
        return mask

    def box(self, index: int) -> Box:
        """Return the box of the visible part of an object, pixels."""
        return self._boxes[index]

    def add(self, sprite: Sprite, left: int, top: int) -> bool:
        """Add an object on top if all objects stay recognisable and have clear captions.

        Returns:
            False, without a change, if an object would be hidden too much or lie in the margin of
            a caption rule.
        """
        owner = self._with(sprite, left, top)
        sprites = [*self.sprites, sprite]
        boxes = [
            self._visible_box(owner, sprites, index)
            if index == len(self.sprites) or self._may_hide(index, sprite, left, top)
            else self._boxes[index]
            for index in range(len(sprites))
        ]
        known = [box for box in boxes if box is not None]
        if len(known) < len(boxes):
            return False
        names = [each.name for each in sprites]
        parts = [parts_from_boxes(index, known, names, self._size) for index in range(len(boxes))]
        clear = [each for each in parts if each is not None]
        if len(clear) < len(parts):
            return False
        self.sprites, self.parts, self._boxes, self._owner = sprites, clear, known, owner
        self.corners.append((left, top))
        return True

    def _with(self, sprite: Sprite, left: int, top: int) -> npt.NDArray[np.int8]:
        owner = self._owner.copy()
        rows, columns, inside = crop_to_picture(sprite.mask.shape, left, top, self._size)
        owner[rows, columns][sprite.mask[inside]] = len(self.sprites)
        return owner

    def _may_hide(self, index: int, sprite: Sprite, left: int, top: int) -> bool:
        height, width = sprite.mask.shape
        x0, y0, x1, y1 = self._boxes[index]
        return x0 < left + width and left < x1 and y0 < top + height and top < y1

    def _visible_box(
        self, owner: npt.NDArray[np.int8], sprites: list[Sprite], index: int
    ) -> Box | None:
        """Return the box of the visible part, or None if too little is visible."""
        mask = owner == index
        count = np.count_nonzero(mask)
        whole = np.count_nonzero(sprites[index].mask)
        if count < max(self._min_pixels, _MIN_VISIBLE_SHARE * whole):
            return None
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def crop_to_picture(
    shape: tuple[int, ...], left: int, top: int, image_size: int
) -> tuple[slice, slice, tuple[slice, slice]]:
    """Return the rows and columns of the picture that a patch covers, and those of the patch.

    Args:
        shape: shape of the patch, [h, w, ...]; it may lie partly or fully outside the picture.
        left: x of its left edge in the picture, pixels.
        top: y of its top edge in the picture, pixels.
        image_size: side of the picture, pixels.
    """
    y0, y1, x0, x1 = (
        min(max(edge, 0), image_size) for edge in (top, top + shape[0], left, left + shape[1])
    )
    inside = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    return slice(y0, y1), slice(x0, x1), inside
