"""What a notebook shows for regions: an overlay and a table, as HTML."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import logging
import os
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from tap_deploy.errors import InputError, first_line
from tap_deploy.image import load_image
from tap_deploy.visualize.colors import color_of
from tap_deploy.visualize.drawing import Drawing
from tap_deploy.visualize.overlay import draw_regions
from tap_deploy.visualize.scaling import MAX_SCALE, scaled_drawing, scaled_picture

MAX_REGIONS = 100  # drawn and listed
MAX_SIDE = 1024  # pixels; larger pictures are shrunk

_GOOD_SIDE = 768  # pixels; smaller pictures are enlarged up to it, so that labels fit beside masks
_CHECKS = (16, 208, 232)  # side of a square in pixels, and the two greys
_JPEG_QUALITY = 88

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableRow:
    """What the table says about a region.

    Attributes:
        name: the likeliest concept; None without concepts.
        probability: its probability; None without concepts.
        iou: predicted IoU of the mask.
        caption: the caption; None without captions.
    """

    name: str | None
    probability: float | None
    iou: float
    caption: str | None


def html_from_drawing(path: str | None, drawing: Drawing, rows: Sequence[TableRow]) -> str:
    """Return an overlay and a table of its regions; a note in their place if drawing fails.

    The overlay is a JPEG of at most ``MAX_SIDE`` pixels a side within the HTML. It shows the
    picture at ``path`` if that is still there, otherwise a chequered background.

    Args:
        path: path of the picture; None if it was not a file.
        drawing: masks, prompts and texts of the regions.
        rows: one row per region.
    """
    parts = []
    notes = [f"{path or 'picture'}: {drawing.width} x {drawing.height} pixels"]
    if len(rows) > MAX_REGIONS:
        notes.append(f"the first {MAX_REGIONS} of {len(rows)} regions")
    try:
        drawing = _first(drawing, MAX_REGIONS)
        overlay, note = _overlay(path, drawing)
        parts.append(_image(overlay, f"{len(drawing)} regions of {notes[0]}"))
        notes += [note] if note else []
    except Exception as exc:  # a cell must show its table whatever is wrong with the picture
        logger.debug("no overlay for the notebook", exc_info=True)
        notes.append(f"not drawn: {first_line(exc)}")
    parts.append(f"<p>{html.escape('; '.join(notes))}</p>")
    parts += _table(rows[:MAX_REGIONS])
    # Bytes of file names that are not UTF-8 would keep the notebook from being saved.
    return f"<div>{''.join(parts)}</div>".encode("utf-8", "backslashreplace").decode()


def _first(drawing: Drawing, count: int) -> Drawing:
    if len(drawing) <= count:
        return drawing
    return dataclasses.replace(
        drawing,
        prompts=drawing.prompts[:count],
        masks=None if drawing.masks is None else drawing.masks[:count],
        texts=drawing.texts[:count],
    )


def _overlay(path: str | None, drawing: Drawing) -> tuple[Image.Image, str]:
    """Return the drawing, and a note if it is on squares in place of the picture."""
    size = drawing.width, drawing.height
    scale = _scale(max(size))
    picture, note = _picture(path, size)
    if scale != 1:
        drawing = scaled_drawing(drawing, scale)
        picture = None if picture is None else scaled_picture(picture, scale)
    canvas = _squares(drawing.width, drawing.height) if picture is None else np.asarray(picture)
    return draw_regions(canvas, drawing), note


def _picture(path: str | None, size: tuple[int, int]) -> tuple[Image.Image | None, str]:
    """Return the picture, or a note that says why there is none."""
    if path is None:
        return None, "masks only, as the picture was not a file; visualize(picture) draws on it"
    if not os.path.isfile(path):  # nor is a pipe read a second time
        return None, "masks only, as the file is not there"
    try:
        picture = Image.fromarray(load_image(path, convert=True))
    except InputError as exc:
        return None, f"masks only: {first_line(exc)}"
    if picture.size != size:
        found = f"{picture.width} x {picture.height}"
        return None, f"masks only, as the file has {found} pixels now"
    return picture, ""


def _squares(width: int, height: int) -> npt.NDArray[np.uint8]:
    side, dark, light = _CHECKS
    odd = (np.arange(height)[:, None] // side + np.arange(width) // side) % 2 == 1
    grey = np.where(odd, dark, light).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _scale(longest: int) -> float:
    """Return the factor for a picture whose longest side has ``longest`` pixels."""
    if longest > MAX_SIDE:
        return MAX_SIDE / longest
    return min(MAX_SCALE, max(1, _GOOD_SIDE // longest))


def _image(picture: Image.Image, text: str) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<img alt="{html.escape(text)}" src="data:image/jpeg;base64,{data}" '
        'style="max-width:100%;height:auto">'
    )


def _table(rows: Sequence[TableRow]) -> Iterator[str]:
    if not rows:
        return
    named = any(row.name is not None for row in rows)
    written = any(row.caption is not None for row in rows)
    heads = ["region", *(["name", "probability"] if named else []), "IoU"]
    heads += ["caption"] if written else []
    yield f"<table><thead>{_cells('th', heads)}</thead><tbody>"
    for index, row in enumerate(rows):
        cells = [f"{row.iou:.2f}"]
        if named:
            chance = "" if row.probability is None else f"{row.probability:.2f}"
            cells = [row.name or "", chance, *cells]
        cells += [row.caption or ""] if written else []
        yield _cells(
            "td", [str(index), *cells], color="#{:02x}{:02x}{:02x}".format(*color_of(index))
        )
    yield "</tbody></table>"


def _cells(tag: str, texts: Sequence[str], color: str | None = None) -> str:
    left = 'style="text-align:left"'
    swatch = "" if color is None else f'<span style="color:{color}">&#9632;</span> '
    cells = [f"<{tag} {left}>{html.escape(text)}</{tag}>" for text in texts]
    return f"<tr>{cells[0].replace('>', f'>{swatch}', 1)}{''.join(cells[1:])}</tr>"
