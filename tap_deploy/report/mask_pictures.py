"""The pictures of one region whose masks differ: the reference, this mask, the difference."""

from __future__ import annotations

import base64
import dataclasses
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from tap_deploy.masks import box_from_mask
from tap_deploy.visualize.colors import Color, color_of
from tap_deploy.visualize.overlay import draw_mask
from tap_deploy.visualize.scaling import scaled_picture

# They differ in lightness, and in hue to every kind of colour-blindness.
ONLY_REFERENCE: Color = (230, 159, 0)  # orange
ONLY_HERE: Color = (0, 94, 168)  # blue
BOTH: Color = (158, 158, 158)

_SMALL, _LARGE = 200, 400  # pixels; the longer side of a picture in the page
_MARGIN = 0.25  # around the masks, as a share of their longer side


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskPictures:
    """PNG files in base64, under the names of a worst case in ``html_from_verification``.

    Attributes:
        reference_png: the picture with the mask of the reference.
        actual_png: the picture with the mask that was found here.
        difference_png: the faded picture with the pixels that only one of the masks has.
    """

    reference_png: str
    actual_png: str
    difference_png: str


def mask_pictures(
    image: npt.NDArray[np.uint8],
    reference: npt.NDArray[np.bool_],
    actual: npt.NDArray[np.bool_],
) -> MaskPictures:
    """Return the pictures of two masks of one region, cut to the surroundings of the masks.

    Args:
        image: the picture, uint8 [H, W, 3] RGB.
        reference: mask of the reference, bool [H, W].
        actual: mask that was found here, bool [H, W].
    """
    window = _window(reference | actual)
    image, reference, actual = image[window], reference[window], actual[window]
    scale = max(1, _SMALL // max(reference.shape))
    image = np.asarray(scaled_picture(Image.fromarray(image), scale))
    reference, actual = (np.kron(m, np.ones((scale, scale), np.bool_)) for m in (reference, actual))
    return MaskPictures(
        reference_png=_png(_with_mask(image, reference)),
        actual_png=_png(_with_mask(image, actual)),
        difference_png=_png(_difference(image, reference, actual)),
    )


def _window(mask: npt.NDArray[np.bool_]) -> tuple[slice, slice]:
    """Return rows and columns of a mask and its surroundings; all of them if it is empty."""
    x, y, width, height = box_from_mask(mask)
    if not width:
        return slice(None), slice(None)
    margin = 8 + round(_MARGIN * max(width, height))
    rows = slice(max(y - margin, 0), y + height + margin)
    return rows, slice(max(x - margin, 0), x + width + margin)


def _with_mask(image: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    canvas = image.copy()
    if mask.any():
        draw_mask(canvas, mask, color_of(0), 1.5 * max(1.0, max(mask.shape) / _LARGE))
    return canvas


def _difference(
    image: npt.NDArray[np.uint8],
    reference: npt.NDArray[np.bool_],
    actual: npt.NDArray[np.bool_],
) -> npt.NDArray[np.uint8]:
    gray = np.asarray(Image.fromarray(image).convert("L"))
    canvas = np.repeat(gray[..., None] // 4 + 191, 3, axis=2).astype(np.uint8)  # [H, W, 3]
    canvas[reference & actual] = BOTH
    canvas[reference & ~actual] = ONLY_REFERENCE
    canvas[actual & ~reference] = ONLY_HERE
    return canvas


def _png(canvas: npt.NDArray[np.uint8]) -> str:
    picture = Image.fromarray(canvas)
    picture.thumbnail((_LARGE, _LARGE))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")
