"""Polygons: outlines of masks along pixel edges, for COCO and GeoJSON."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from tap_deploy.errors import InputError
from tap_deploy.formats.described import DescribedRegions
from tap_deploy.formats.json_values import json_number
from tap_deploy.masks import Rle, box_from_rle
from tap_deploy.optional_modules import require_module

Polygon = Any  # shapely.Polygon; shapely has no type information


def coco_polygons(rles: Sequence[Rle], tolerance: float) -> list[list[list[float]]]:
    """Return the outlines of masks as COCO polygons; see ``Regions.to_polygons``."""
    _require_tolerance(tolerance)
    shapely = _shapely()
    return [
        [
            shapely.get_coordinates(piece.exterior)[:-1].ravel().tolist()
            for part in _outline(shapely, rle, tolerance)
            for piece in _without_holes(shapely, part)
        ]
        for rle in rles
    ]


def feature_collection(
    regions: DescribedRegions, rles: Sequence[Rle], tolerance: float
) -> dict[str, Any]:
    """Return regions as GeoJSON, see ``Regions.to_geojson``; ``rles`` are the regions' masks."""
    _require_tolerance(tolerance)
    shapely = _shapely()
    features = [
        {
            "type": "Feature",
            "id": index,
            "geometry": _geometry(shapely, _outline(shapely, rle, tolerance)),
            "properties": _properties(regions, index),
        }
        for index, rle in enumerate(rles)
    ]
    return {"type": "FeatureCollection", "features": features}


def _properties(regions: DescribedRegions, index: int) -> dict[str, Any]:
    name, probability = regions.likeliest(index) or (None, math.nan)
    return {
        "name": name,
        "probability": json_number(probability),
        "caption": None if regions.captions is None else regions.captions[index],
        "iou_prediction": json_number(regions.iou_predictions[index]),
    }


def _geometry(shapely: ModuleType, outline: Sequence[Polygon]) -> dict[str, Any] | None:
    if not len(outline):
        return None
    shape = outline[0] if len(outline) == 1 else shapely.multipolygons(outline)
    geometry: dict[str, Any] = json.loads(shapely.to_geojson(shapely.orient_polygons(shape)))
    return geometry


def _outline(shapely: ModuleType, rle: Rle, tolerance: float) -> Sequence[Polygon]:
    """Return the outline of a mask as polygons with holes.

    Pixel (x, y) is the square from (x, y) to (x + 1, y + 1). Pixels that touch only at a corner
    are not connected, so that the polygons are valid.

    Args:
        shapely: the module.
        rle: the mask.
        tolerance: maximum distance that the outline may move, pixels; 0 follows the pixel edges.
    """
    x, y, width, height = box_from_rle(rle)
    columns = _columns(rle, x, width)[:, y : y + height]
    edges = np.concatenate([_straight_edges(columns.T), _straight_edges(columns)[..., ::-1]])
    faces = shapely.get_parts(shapely.polygonize(shapely.linestrings(edges)))
    # A face between edges is all foreground or all background, so one of its pixels is enough.
    inside = np.floor(shapely.get_coordinates(shapely.point_on_surface(faces))).astype(np.int64)
    filled = faces[columns[inside[:, 0], inside[:, 1]]]
    placed = shapely.transform(filled, lambda corners: corners + np.array([x, y]))
    return _simplified(shapely, placed, tolerance) if tolerance else placed


def _simplified(
    shapely: ModuleType, polygons: Sequence[Polygon], tolerance: float
) -> Sequence[Polygon]:
    """Return polygons with fewer corners, whose rings neither cross nor vanish.

    Rings are simplified as closed lines, because shapely may also remove the first corner of a
    ring, and then deviates by up to twice the tolerance.
    """
    rings, owner = shapely.get_rings(polygons, return_index=True)
    corners, ring = shapely.get_coordinates(rings, return_index=True)
    lines = shapely.multilinestrings(shapely.linestrings(corners, indices=ring))
    simple = shapely.get_parts(shapely.simplify(lines, tolerance, preserve_topology=True))
    corners, ring = shapely.get_coordinates(simple, return_index=True)
    result: Sequence[Polygon] = shapely.polygons(
        shapely.linearrings(corners, indices=ring), indices=owner
    )
    return result


def _columns(rle: Rle, x: int, width: int) -> npt.NDArray[np.bool_]:
    """Return ``width`` columns of a mask from column ``x`` on, bool [width, H]."""
    height = rle["size"][0]
    ends = np.clip(np.cumsum(rle["counts"]) - x * height, 0, width * height)
    values = np.arange(len(ends)) % 2 == 1  # runs start with background
    return np.repeat(values, np.diff(ends, prepend=0)).reshape(width, height)


def _straight_edges(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return the horizontal edges of a mask bool [h, w], int64 [E, 2, 2]: (x, y) to (x, y).

    An edge has foreground on one side over its whole length. Where two pixels touch only at a
    corner, the foreground changes sides, and the edge ends.
    """
    steps = np.diff(np.pad(mask.astype(np.int8), 1), axis=0)
    changes = np.flatnonzero(np.diff(steps.ravel())) + 1
    first = np.flatnonzero(steps.ravel()[changes])  # the other changes end an edge
    row, start = np.divmod(changes[first], steps.shape[1])
    length = changes[first + 1] - changes[first]
    start -= 1  # padding
    edges: npt.NDArray[np.int64] = np.stack([start, row, start + length, row], axis=1)
    return edges.reshape(-1, 2, 2)


def _without_holes(shapely: ModuleType, polygon: Polygon) -> Iterator[Polygon]:
    """Cut a polygon along vertical lines through its holes until no piece has holes."""
    if not polygon.interiors:
        yield polygon
        return
    left, top, right, bottom = polygon.bounds
    x = _cut(shapely, polygon.interiors)
    for half in (shapely.box(left, top, x, bottom), shapely.box(x, top, right, bottom)):
        for piece in shapely.get_parts(polygon.intersection(half)):
            if piece.geom_type == "Polygon":  # not a line or a point on the cut
                yield from _without_holes(shapely, piece)


def _cut(shapely: ModuleType, holes: Sequence[Any]) -> float:
    """Return the x of a vertical line through the median hole."""
    by_middle = sorted(holes, key=lambda hole: hole.bounds[0] + hole.bounds[2])
    xs = shapely.get_coordinates(by_middle[len(holes) // 2])[:, 0]
    middle = (xs.min() + xs.max()) / 2
    between_pixels = math.floor(middle)
    along_edge = ((xs[1:] == between_pixels) & (xs[:-1] == between_pixels)).any()
    return between_pixels if between_pixels > xs.min() or along_edge else float(middle)


def _require_tolerance(value: Any) -> None:
    is_number = isinstance(value, numbers.Real)
    if not is_number or not 0 <= value < math.inf:
        raise InputError(f"tolerance is {value!r}; expected a number of pixels >= 0")


def _shapely() -> ModuleType:
    return require_module("shapely", "polygon output", "polygons")
