"""Overlays: masks, prompts and labels drawn on the picture."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from tap_deploy.config import PointLabel
from tap_deploy.errors import InputError
from tap_deploy.image import load_image
from tap_deploy.masks import box_from_mask
from tap_deploy.pictures.source import ImageSource
from tap_deploy.visualize.colors import SHADOW, Box, Color, color_of
from tap_deploy.visualize.enlarge import MAX_SCALE, enlarged_picture, enlarged_regions
from tap_deploy.visualize.fonts import font_from_path
from tap_deploy.visualize.labels import LabelStyle, LabelTexts, labels_from_texts
from tap_deploy.visualize.layout import LabelLayout
from tap_deploy.visualize.markers import draw_boxes, draw_points

if TYPE_CHECKING:
    from tap_deploy.regions import Regions

_TINT = 0.42  # opacity of a mask
_SMALL = 0.01  # of the picture; a label would hide such a region as a whole
_COVER_MAP_SIDE = 160  # pixels; labels need no finer idea of where masks are

Canvas = npt.NDArray[np.uint8]  # [H, W, 3] RGB, drawn on in place


def draw_regions(
    image: ImageSource,
    regions: Regions,
    scale: int = 1,
    *,
    font: str | os.PathLike[str] | None = None,
) -> Image.Image:
    """Return the picture with its regions drawn on it, mode RGB, ``scale`` times its size.

    Each region has a colour of its own: its mask is tinted and outlined, its box is framed, and
    a dark plate near it tells the likeliest concept with its probability, and the caption.
    Prompt points are discs, green with + for foreground and red with - for background. Labels
    that would hide each other, as in a picture full of regions, are left out.

    Args:
        image: the picture that was predicted on; greyscale and the like are fine here.
        regions: what was predicted.
        scale: by how much the sides are enlarged first, 1..16: on a small picture labels would
            hide what they are about, and lines would be coarse.
        font: a TrueType or OpenType file for the labels. Without it they are in Pillow's own
            font; in both cases what that lacks comes from the fonts of the system.

    Raises:
        InputError: the picture cannot be read, or has another size; no such scale; or a font
            that cannot be read.
    """
    font_file = None if font is None else font_from_path(font)
    if not 1 <= scale <= MAX_SCALE:
        raise InputError(f"scale of the overlay is {scale}; expected 1 to {MAX_SCALE}")
    canvas = np.array(load_image(image, convert=True))
    height, width = canvas.shape[:2]
    if (height, width) != (regions.image_height, regions.image_width):
        raise InputError(
            f"image is {width} x {height} (width x height); expected {regions.image_width} x "
            f"{regions.image_height}, the picture that these regions belong to"
        )
    if scale > 1:
        canvas = np.array(enlarged_picture(Image.fromarray(canvas), scale))
        regions, height, width = enlarged_regions(regions, scale), height * scale, width * scale
    line_width = max(1.0, math.sqrt(width * height) / 320)
    _draw_masks(canvas, regions, line_width)
    picture = Image.fromarray(canvas)
    draw_boxes(picture, regions.prompts, round(line_width))
    points = draw_points(picture, regions.prompts, round(line_width))
    style = LabelStyle.for_picture(width, height, font_file)
    _draw_labels(picture, regions, points, round(line_width), style)
    return picture


def _draw_masks(canvas: Canvas, regions: Regions, line_width: float) -> None:
    areas = np.array([regions.area(index) or 0 for index in range(len(regions))])
    for index in np.argsort(-areas, kind="stable").tolist():  # small ones last: nothing hides them
        mask = regions.mask(index) if areas[index] else None
        if mask is not None:
            _draw_mask(canvas, mask, color_of(index), line_width)


def _draw_mask(
    canvas: Canvas, mask: npt.NDArray[np.bool_], color: Color, line_width: float
) -> None:
    """Tint a mask and draw a smooth line along its edge."""
    x, y, width, height = box_from_mask(mask)
    blur = line_width / 2 + 1.5  # just enough for the line, its shadow and their soft edges
    margin = math.ceil(4 * blur)
    rows = slice(max(y - margin, 0), y + height + margin)
    columns = slice(max(x - margin, 0), x + width + margin)
    crop, inside = canvas[rows, columns], mask[rows, columns]
    soft = Image.fromarray(inside.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(blur))
    # A blurred edge rises by 0.4 / blur a pixel around 0.5: that gives the distance to it.
    distance = np.abs(np.asarray(soft, np.float32) / 255 - 0.5) * (blur / 0.4)  # pixels
    is_speck = np.count_nonzero(inside) < (4 * line_width) ** 2  # too small for an outline
    _blend(crop, SHADOW, 0.45 * (line_width / 2 + 1.75 - distance).clip(0, 1))
    _blend(crop, color, inside * np.float32(0.9 if is_speck else _TINT))
    _blend(crop, color, (line_width / 2 + 0.75 - distance).clip(0, 1))


def _blend(canvas: Canvas, color: Color, opacity: npt.NDArray[np.floating[Any]]) -> None:
    for channel, value in enumerate(color):
        plane = canvas[..., channel]
        plane[...] = np.rint(plane + opacity * (np.float32(value) - plane))


def _draw_labels(
    picture: Image.Image,
    regions: Regions,
    points: list[Box],
    line_width: int,
    style: LabelStyle,
) -> None:
    width, height = picture.size
    boxes = [_region_box(regions, index) for index in range(len(regions))]
    small = [box for box in boxes if _area(box) < _SMALL * width * height]
    inset, covered = style.padding // 2, _cover_map(regions)
    layout = LabelLayout(width, height, inset=inset, covered=covered, keep=[*points, *small])
    texts = [_texts(regions, index) for index in range(len(regions))]
    plates = []
    for index, label in enumerate(labels_from_texts(texts, style, width, height)):
        corner = layout.place(label, boxes[index], gap=style.padding)
        if corner is None:
            continue
        plates.append((label.plate(color_of(index), style), corner))
        plate = (*corner, corner[0] + label.width, corner[1] + label.height)
        _draw_leader(picture, regions, index, plate, 2 * style.padding, line_width)
    for image, corner in plates:
        picture.paste(image, corner, image)


def _draw_leader(
    picture: Image.Image, regions: Regions, index: int, plate: Box, reach: int, line_width: int
) -> None:
    """Lead a line from a label to its region, if it had to be placed out of reach of it."""
    points = _sample_points(regions, index)
    low, high = np.array(plate[:2]), np.array(plate[2:])
    nearest = points.clip(low, high)
    distance = np.hypot(*(points - nearest).T)
    best = int(distance.argmin())
    if distance[best] > reach:
        draw = ImageDraw.Draw(picture)
        line = [tuple(nearest[best].tolist()), tuple(points[best].tolist())]
        for color, extra in ((SHADOW, 2), (color_of(index), 0)):
            draw.line(line, color, line_width + extra)
            (x, y), reach = line[1], line_width + extra
            draw.ellipse((x - reach, y - reach, x + reach, y + reach), color)


def _sample_points(regions: Regions, index: int) -> npt.NDArray[np.float64]:
    """Return points XY of the region, float [n, 2]: some of its mask, else its prompt's."""
    mask = regions.mask(index)
    if mask is not None:
        step = _cover_step(regions)
        ys, xs = np.nonzero(mask[::step, ::step])
        if len(xs):
            return step * np.stack([xs, ys], axis=1).astype(np.float64)
    x0, y0, x1, y1 = _prompt_box(regions, index)
    return np.array([[x, y] for x in (x0, x1) for y in (y0, y1)])


def _texts(regions: Regions, index: int) -> LabelTexts:
    caption = regions.captions[index] if regions.captions is not None else ""
    concepts = regions.concepts[index] if regions.concepts is not None else []
    if concepts:
        name, probability = concepts[0]
        return LabelTexts(title=name, detail=f"{probability:.2f}", caption=caption)
    detail = f"IoU {regions.iou_predictions[index]:.2f}"
    return LabelTexts(title=f"region {index}", detail=detail, caption=caption)


def _region_box(regions: Regions, index: int) -> Box:
    x, y, width, height = regions.box(index) or (0, 0, 0, 0)
    return (x, y, x + width, y + height) if width else _prompt_box(regions, index)


def _prompt_box(regions: Regions, index: int) -> Box:
    used = regions.prompts.labels[index] != PointLabel.PADDING
    coords = regions.prompts.coords[index, used]
    (x0, y0), (x1, y1) = coords.min(axis=0).tolist(), coords.max(axis=0).tolist()
    return (x0, y0, x1, y1)


def _cover_map(regions: Regions) -> npt.NDArray[np.bool_]:
    height, width = regions.image_height, regions.image_width
    step = _cover_step(regions)
    covered = np.zeros((height, width), np.bool_)[::step, ::step]
    for index in range(len(regions)):
        mask = regions.mask(index)
        if mask is not None:
            covered |= mask[::step, ::step]
    return covered


def _cover_step(regions: Regions) -> int:
    return max(1, math.ceil(max(regions.image_height, regions.image_width) / _COVER_MAP_SIDE))


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
