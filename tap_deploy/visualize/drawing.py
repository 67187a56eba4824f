"""The content of an overlay: a mask, a prompt and label texts per region."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tap_deploy.config import PointLabel
from tap_deploy.masks import box_from_mask
from tap_deploy.prompts import Prompts
from tap_deploy.visualize.colors import Box
from tap_deploy.visualize.labels import LabelTexts

_COARSE_SIDE = 160  # pixels; sufficient for placing labels

Mask = npt.NDArray[np.bool_]  # [H, W]
Masks = Sequence[Mask] | npt.NDArray[np.bool_]  # P masks, or one array [P, H, W]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Summary of a mask, so that it is decoded only once.

    Attributes:
        area: area, pixels.
        box: bounding box [x0, y0, x1, y1], pixels; None for an empty mask.
        coarse: every ``Drawing.step``-th pixel of every ``step``-th row, bool [h, w].
    """

    area: int
    box: Box | None
    coarse: Mask


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Drawing:
    """P regions to draw.

    Attributes:
        height: height H of the picture, pixels.
        width: width W of the picture, pixels.
        prompts: P prompts, in pixels of the picture.
        masks: P masks bool [H, W]; a sequence may decode them one at a time. None without masks.
        texts: P label texts.
    """

    height: int
    width: int
    prompts: Prompts
    masks: Masks | None
    texts: Sequence[LabelTexts]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def step(self) -> int:
        """Distance between the samples of a coarse mask, pixels."""
        return max(1, math.ceil(max(self.height, self.width) / _COARSE_SIDE))

    @functools.cached_property
    def shapes(self) -> list[Shape]:
        """Summary of each mask; empty without masks. Each mask is decoded once."""
        return [] if self.masks is None else [self._shape(mask) for mask in self.masks]

    def covered(self) -> Mask:
        """Return the union of all masks as a coarse mask, bool [h, w]."""
        covered = np.zeros((self.height, self.width), np.bool_)[:: self.step, :: self.step]
        for shape in self.shapes:
            covered |= shape.coarse
        return covered

    def box(self, index: int) -> Box:
        """Return the box of a region's mask, or of its prompt without one, [x0, y0, x1, y1]."""
        box = self.shapes[index].box if self.shapes else None
        return self.prompt_box(index) if box is None else box

    def prompt_box(self, index: int) -> Box:
        """Return the box around the points of a prompt, [x0, y0, x1, y1] in pixels."""
        used = self.prompts.labels[index] != PointLabel.PADDING
        coords = self.prompts.coords[index, used]
        (x0, y0), (x1, y1) = coords.min(axis=0).tolist(), coords.max(axis=0).tolist()
        return (x0, y0, x1, y1)

    def sample_points(self, index: int) -> npt.NDArray[np.float64]:
        """Return points of a region's mask, or of its prompt without one, float XY [n, 2]."""
        if self.shapes:
            ys, xs = np.nonzero(self.shapes[index].coarse)
            if len(xs):
                return self.step * np.stack([xs, ys], axis=1).astype(np.float64)
        x0, y0, x1, y1 = self.prompt_box(index)
        return np.array([[x, y] for x in (x0, x1) for y in (y0, y1)])

    def _shape(self, mask: Mask) -> Shape:
        area = int(np.count_nonzero(mask))
        x, y, width, height = box_from_mask(mask)
        box = (x, y, x + width, y + height) if area else None
        return Shape(area=area, box=box, coarse=mask[:: self.step, :: self.step].copy())
