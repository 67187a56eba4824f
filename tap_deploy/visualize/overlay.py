"""Draws masks, prompts and labels on a picture."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from tap_deploy.errors import InputError
from tap_deploy.image import load_image
from tap_deploy.masks import box_from_mask
from tap_deploy.pictures.source import ImageSource
from tap_deploy.visualize.colors import SHADOW, Box, Color, color_of
from tap_deploy.visualize.drawing import Drawing
from tap_deploy.visualize.fonts import font_from_path
from tap_deploy.visualize.labels import LabelStyle, labels_from_texts
from tap_deploy.visualize.layout import LabelLayout
from tap_deploy.visualize.markers import draw_boxes, draw_points
from tap_deploy.visualize.scaling import MAX_SCALE, scaled_drawing, scaled_picture

_TINT = 0.42  # opacity of a mask
_SMALL = 0.01  # share of the picture; a label could hide a smaller region completely

Canvas = npt.NDArray[np.uint8]  # [H, W, 3] RGB, modified in place


def draw_regions(
    image: ImageSource,
    drawing: Drawing,
    scale: int = 1,
    *,
    font: str | os.PathLike[str] | None = None,
) -> Image.Image:
    """Return the picture with its regions drawn on it, mode RGB, ``scale`` times its size.

    Each region has its own colour: its mask is tinted and outlined, its box is drawn, and a dark
    label nearby shows the likeliest concept with its probability, and the caption. Prompt points
    are discs: green with + for foreground, red with - for background. Labels that would overlap
    are left out.

    Args:
        image: the picture that was predicted on; any mode that ``load_image`` converts.
        drawing: masks, prompts and texts of its regions.
        scale: factor by which the picture is enlarged before drawing, 1..16. On a small picture,
            unscaled labels hide their regions and lines are coarse.
        font: a TrueType or OpenType file for the labels; None for Pillow's default font.
            Characters that it lacks are taken from the system fonts.

    Raises:
        InputError: the picture cannot be read or has another size than the drawing, ``scale`` is
            out of range, or the font cannot be read.
    """
    font_file = None if font is None else font_from_path(font)
    if not 1 <= scale <= MAX_SCALE:
        raise InputError(f"scale of the overlay is {scale}; expected 1 to {MAX_SCALE}")
    canvas = np.array(load_image(image, convert=True))
    height, width = canvas.shape[:2]
    if (height, width) != (drawing.height, drawing.width):
        raise InputError(
            f"image is {width} x {height} (width x height); expected {drawing.width} x "
            f"{drawing.height}, the picture that these regions belong to"
        )
    if scale > 1:
        canvas = np.array(scaled_picture(Image.fromarray(canvas), scale))
        drawing, height, width = scaled_drawing(drawing, scale), height * scale, width * scale
    line_width = max(1.0, math.sqrt(width * height) / 320)
    _draw_masks(canvas, drawing, line_width)
    picture = Image.fromarray(canvas)
    draw_boxes(picture, drawing.prompts, round(line_width))
    points = draw_points(picture, drawing.prompts, round(line_width))
    style = LabelStyle.for_picture(width, height, font_file)
    _draw_labels(picture, drawing, points, round(line_width), style)
    return picture


def _draw_masks(canvas: Canvas, drawing: Drawing, line_width: float) -> None:
    if drawing.masks is None:
        return
    areas = np.array([shape.area for shape in drawing.shapes])
    for index in np.argsort(-areas, kind="stable").tolist():  # small masks on top
        if areas[index]:
            draw_mask(canvas, drawing.masks[index], color_of(index), line_width)


def draw_mask(canvas: Canvas, mask: npt.NDArray[np.bool_], color: Color, line_width: float) -> None:
    """Tint a mask and draw a smooth line along its edge.

    Args:
        canvas: the picture, uint8 [H, W, 3] RGB, modified in place.
        mask: bool [H, W], not empty.
        color: RGB 0..255.
        line_width: width of the line, pixels.
    """
    x, y, width, height = box_from_mask(mask)
    blur = line_width / 2 + 1.5  # wide enough for the line, its shadow and their soft edges
    margin = math.ceil(4 * blur)
    rows = slice(max(y - margin, 0), y + height + margin)
    columns = slice(max(x - margin, 0), x + width + margin)
    crop, inside = canvas[rows, columns], mask[rows, columns]
    soft = Image.fromarray(inside.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(blur))
    # A blurred edge has the slope 0.4 / blur per pixel at 0.5, which gives the distance to it.
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
    drawing: Drawing,
    points: list[Box],
    line_width: int,
    style: LabelStyle,
) -> None:
    width, height = picture.size
    boxes = [drawing.box(index) for index in range(len(drawing))]
    small = [box for box in boxes if _area(box) < _SMALL * width * height]
    inset, covered = style.padding // 2, drawing.covered()
    layout = LabelLayout(width, height, inset=inset, covered=covered, keep=[*points, *small])
    plates = []
    for index, label in enumerate(labels_from_texts(drawing.texts, style, width, height)):
        corner = layout.place(label, boxes[index], gap=style.padding)
        if corner is None:
            continue
        plates.append((label.plate(color_of(index), style), corner))
        plate = (*corner, corner[0] + label.width, corner[1] + label.height)
        _draw_leader(picture, drawing, index, plate, 2 * style.padding, line_width)
    for image, corner in plates:
        picture.paste(image, corner, image)


def _draw_leader(
    picture: Image.Image, drawing: Drawing, index: int, plate: Box, reach: int, line_width: int
) -> None:
    """Draw a line from a label to its region, if the label is farther away than ``reach``."""
    points = drawing.sample_points(index)
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


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
