"""Views of a picture that a point grid is laid on: the whole picture, and overlapping crops."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tap_deploy.config import PointLabel
from tap_deploy.errors import InputError
from tap_deploy.image import Frame, load_image, model_image
from tap_deploy.prediction.answers import Request
from tap_deploy.prediction.inputs import EncodedImage, Picture, path_of, request_from
from tap_deploy.prediction.options import GridOptions, PredictOptions
from tap_deploy.prediction.suppression import Bits, Boxes, packed, unpacked
from tap_deploy.prompts import Prompts

MIN_CROP_SIDE = 16  # pixels; smaller crops hold nothing that the model could segment
OUTSIDE = -100.0  # logit outside a crop

Floats = npt.NDArray[np.float32]
CropBox = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """The whole picture or a crop of it, with its point grid.

    Attributes:
        layer: 0 for the whole picture, n for the crops of layer n.
        box: place in the picture, XYXY, pixels.
        request: its pixels or embeddings; prompts are in pixels of the view.
    """

    layer: int
    box: CropBox
    request: Request

    def cuts_off(self, boxes: Boxes, size: tuple[int, int], picture: View) -> npt.NDArray[np.bool_]:
        """Return which regions end at an edge of the view that is inside the picture, bool [n].

        Args:
            boxes: boxes in low-resolution cells of the view, float64 [n, 4] XYXY.
            size: columns and rows of low-resolution cells in the view.
            picture: view of the whole picture.
        """
        edges = (0, 0, *size)
        inner = np.array(self.box) != picture.box
        touching: npt.NDArray[np.bool_] = ((boxes == edges) & inner).any(axis=1)
        return touching

    def prompts_in_picture(self, prompts: Prompts) -> Prompts:
        """Return prompts of the view in pixels of the picture."""
        is_padding = prompts.labels[..., None] == PointLabel.PADDING
        corner = np.array(self.box[:2], np.float32)
        moved = np.where(is_padding, prompts.coords, prompts.coords + corner)
        return Prompts(coords=moved, labels=prompts.labels)

    def logits_in(self, picture: View, logits: Floats) -> Floats:
        """Return logits [n, S, S] of the view in the model frame of the whole picture.

        Each place takes the nearest logit of the view; places outside the view get ``OUTSIDE``.
        """
        if self.layer == 0:
            return logits
        rows, columns = self._cells(picture, logits.shape[1])
        moved = np.take(np.take(logits, rows, axis=1), columns, axis=2)
        moved[:, rows < 0] = OUTSIDE
        moved[:, :, columns < 0] = OUTSIDE
        return moved

    def bits_in(self, picture: View, bits: Bits, size: int) -> Bits:
        """Return packed masks of the view, from logits [S, S], on the raster of the picture."""
        if self.layer == 0:
            return bits
        own, whole = (low_res_size(view.request.frame, size) for view in (self, picture))
        rows, columns = self._cells(picture, size)
        rows, columns = rows[: whole[0]], columns[: whole[1]]
        outside = (rows[:, None] < 0) | (columns < 0)
        moved = np.empty((len(bits), *whole), np.bool_)
        for index, mask in enumerate(moved):
            [one] = unpacked(bits[index : index + 1], *own)
            mask[:] = one[rows][:, columns] & ~outside
        return packed(moved)

    def _cells(self, picture: View, size: int) -> tuple[npt.NDArray[np.intp], ...]:
        """Return row and column of the cell of the view nearest to each cell of the picture.

        Returns:
            Two arrays intp [size]; -1 outside the view.
        """
        own, frame = self.request.frame, picture.request.frame
        centres = (np.arange(size) + 0.5) * (frame.image_size / size / frame.scale)  # pixels
        cells = []
        for axis, count in enumerate(low_res_size(own, size)[::-1]):  # x, then y
            low, high = self.box[axis], self.box[axis + 2]
            inside = (centres >= low) & (centres < high)
            nearest = np.floor((centres - low) * (own.scale * size / own.image_size))
            cells.append(np.where(inside, nearest.clip(0, count - 1), -1).astype(np.intp))
        return cells[1], cells[0]


def views_of(
    image: Picture, image_size: int, grid: GridOptions, options: PredictOptions
) -> Iterator[View]:
    """Yield the whole picture, then its crops, row by row and layer by layer.

    Raises:
        InputError: the picture cannot be read, is too small for the crops, or is already encoded
            and crops need its pixels.
    """
    if not grid.crop_n_layers:
        request = request_from(image, Prompts.from_points([]), image_size, options)
        yield _view(0, (0, 0, request.frame.width, request.frame.height), request, grid)
        return
    if isinstance(image, EncodedImage):
        raise InputError(
            f"crop_n_layers is {grid.crop_n_layers} and the picture is already encoded; expected "
            "the picture itself: every crop is encoded separately"
        )
    rgb = load_image(image)
    height, width = rgb.shape[:2]
    for layer in range(grid.crop_n_layers + 1):
        for box in crop_boxes(height, width, layer, grid.crop_overlap_ratio):
            x0, y0, x1, y1 = box
            images, frame = model_image(np.ascontiguousarray(rgb[y0:y1, x0:x1]), image_size)
            prompts = Prompts.from_points([])
            request = Request(
                prompts=prompts, frame=frame, images=images, embeddings=None, path=path_of(image)
            )
            yield _view(layer, box, request, grid)


def num_points(grid: GridOptions) -> int:
    """Return the number of points on all views."""
    layers = range(grid.crop_n_layers + 1)
    return sum(4**layer * grid.points_of_layer(layer) ** 2 for layer in layers)


def crop_boxes(height: int, width: int, layer: int, overlap_ratio: float) -> list[CropBox]:
    """Return the crops of a layer, XYXY in pixels: 2**layer per side, of equal size.

    Neighbours overlap by ``overlap_ratio`` of the shorter side of the picture in layer 1, half as
    much in layer 2, and so on.

    Raises:
        InputError: a crop has a side of less than 16 pixels.
    """
    count = 2**layer
    if count == 1:
        return [(0, 0, width, height)]
    overlap = int(overlap_ratio * min(height, width) * 2 / count)
    crop_width, crop_height = (
        -(-(side + overlap * (count - 1)) // count) for side in (width, height)
    )
    if min(crop_width, crop_height) < max(MIN_CROP_SIDE, overlap + 1):
        raise InputError(
            f"image is {width} x {height} (width x height): crops of layer {layer} would be "
            f"{crop_width} x {crop_height}; expected at least {MIN_CROP_SIDE} pixels; pass a "
            "smaller crop_n_layers"
        )
    corners = [
        (column * (crop_width - overlap), row * (crop_height - overlap))
        for row in range(count)
        for column in range(count)
    ]
    return [(x, y, min(x + crop_width, width), min(y + crop_height, height)) for x, y in corners]


def grid_points(width: int, height: int, per_side: int) -> npt.NDArray[np.float64]:
    """Return the centres of ``per_side`` x ``per_side`` equal cells, XY in pixels, row by row.

    Returns:
        float64 [per_side**2, 2].
    """
    centres = (np.arange(per_side) + 0.5) / per_side
    x, y = np.meshgrid(centres * width, centres * height)
    return np.column_stack([x.ravel(), y.ravel()])


def low_res_size(frame: Frame, size: int) -> tuple[int, int]:
    """Return rows and columns of the logits [size, size] that the picture reaches."""
    rows, columns = (
        -(-scaled * size // frame.image_size)
        for scaled in (frame.scaled_height, frame.scaled_width)
    )
    return rows, columns


def _view(layer: int, box: CropBox, request: Request, grid: GridOptions) -> View:
    frame = request.frame
    points = grid_points(frame.width, frame.height, grid.points_of_layer(layer))
    labels = np.full((len(points), 1), PointLabel.FOREGROUND)
    prompts = Prompts.from_points(np.concatenate([points, labels], axis=1)[:, None])
    return View(layer=layer, box=box, request=dataclasses.replace(request, prompts=prompts))
