"""Outlines of masks: COCO polygons and GeoJSON, filled again by pycocotools and shapely."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

shapely = pytest.importorskip("shapely")

from tap_deploy.errors import InputError, MissingDependencyError
from tests.made_regions import empty, made_up, with_masks, with_rles

# pycocotools does not speak NumPy 2's __array__ yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Mask = npt.NDArray[np.bool_]

PICTURES = {
    "one pixel": "...\n.#.\n...",
    "everything": "##\n##\n##",
    "a hole": "###\n#.#\n###",
    "an island in a hole": "#####\n#...#\n#.#.#\n#...#\n#####",
    "an island that touches the corner of its hole": "####.\n#..#.\n#.#.#\n##.##\n.####",
    "pixels that touch at corners": "#.#.\n.#.#\n#.#.",
    "holes that touch at corners": "#####\n#.#.#\n##.##\n#.#.#\n#####",
    "a hole that touches the outside": ".####\n##.##\n#.###\n#####",
    "parts apart": "##..#\n.....\n#...#",
    "the borders": "#...#\n.....\n..#..\n#####",
}


def drawn(picture: str) -> Mask:
    return np.array([[pixel == "#" for pixel in row] for row in picture.split("\n")])


def random_masks(count: int) -> list[Mask]:
    """Noise of all densities, in pixels and in blocks, with holes, islands and touching corners."""
    random = np.random.default_rng(7)
    masks = []
    for _ in range(count):
        height, width = random.integers(2, 25, 2)
        noise = random.random((height, width)) < random.uniform(0.05, 0.95)
        masks.append(np.kron(noise, np.ones(random.integers(1, 4, 2), np.bool_)))
    return masks


def blob(size: int = 200) -> Mask:
    """A round shape with a wavy border, two round holes and a small island in one of them."""
    y, x = np.mgrid[:size, :size] - size / 2
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    mask = radius < 0.4 * size + 5 * np.sin(7 * angle)
    for middle in (-40, 40):
        mask &= np.hypot(x - middle, y) > 25
    mask |= np.hypot(x - 40, y) < 8
    return np.asarray(mask)


def polygons_of(mask: Mask, tolerance: float = 0.0) -> list[Any]:
    (rings,) = with_masks(mask[None]).to_polygons(tolerance)
    return [shapely.Polygon(np.reshape(ring, (-1, 2))) for ring in rings]


def shape_of(mask: Mask, tolerance: float = 0.0) -> Any:
    (feature,) = with_masks(mask[None]).to_geojson(tolerance)["features"]
    return shapely.from_geojson(json.dumps(feature["geometry"]))


def filled(mask: Mask) -> Mask:
    """Return the mask that pycocotools makes of a mask's polygons."""
    coco_mask = pytest.importorskip("pycocotools.mask")
    (rings,) = with_masks(mask[None]).to_polygons()
    parts = coco_mask.frPyObjects(rings, *mask.shape)
    return np.asarray(coco_mask.decode(coco_mask.merge(parts)), np.bool_)


@pytest.mark.parametrize("name", PICTURES)
def test_filled_polygons_are_the_mask(name: str) -> None:
    mask = drawn(PICTURES[name])
    np.testing.assert_array_equal(filled(mask), mask)
    check_exact(mask)


def test_filled_polygons_of_random_masks_are_the_masks() -> None:
    for mask in [*random_masks(150), blob()]:
        if mask.any():
            np.testing.assert_array_equal(filled(mask), mask)
        check_exact(mask)


def check_exact(mask: Mask) -> None:
    """Polygons are simple, share no area and run along the edges of pixels; so does GeoJSON."""
    polygons = polygons_of(mask)
    assert all(polygon.is_valid for polygon in polygons)
    assert sum(polygon.area for polygon in polygons) == mask.sum()
    assert shapely.union_all(polygons).area == mask.sum()
    corners = shapely.get_coordinates(polygons)
    np.testing.assert_array_equal(corners, np.round(corners))
    if mask.any():
        shape = shape_of(mask)
        assert shape.is_valid
        y, x = np.mgrid[: mask.shape[0], : mask.shape[1]]
        np.testing.assert_array_equal(shapely.contains_xy(shape, x + 0.5, y + 0.5), mask)
        assert shape.area == mask.sum()


def test_only_corners_are_given() -> None:
    (rings,) = with_masks(drawn("....\n.##.\n.##.\n....")[None]).to_polygons()
    (ring,) = rings
    assert len(ring) == 8
    assert {(x, y) for x, y in zip(ring[::2], ring[1::2], strict=True)} == {
        (1, 1),
        (3, 1),
        (3, 3),
        (1, 3),
    }


@pytest.mark.parametrize("tolerance", [0.5, 1, 2.5, 6])
def test_simplified_outlines_stay_within_the_tolerance(tolerance: float) -> None:
    for mask in [*random_masks(40), blob()]:
        if not mask.any():
            continue
        exact, simple = shape_of(mask), shape_of(mask, tolerance)
        assert simple.is_valid
        distance = shapely.hausdorff_distance(exact.boundary, simple.boundary, densify=0.2)
        assert distance <= tolerance + 1e-9
        assert count_rings(simple) == count_rings(exact)
        polygons = polygons_of(mask, tolerance)
        assert all(polygon.is_valid for polygon in polygons)
        assert math.isclose(sum(polygon.area for polygon in polygons), simple.area)
        assert math.isclose(shapely.union_all(polygons).area, simple.area)
        assert shapely.symmetric_difference(shapely.union_all(polygons), simple).area < 1e-6


def count_rings(shape: Any) -> int:
    return len(shapely.get_rings(shapely.get_parts(shape)))


def test_tolerance_1_does_without_stairs() -> None:
    corners = [shapely.get_num_coordinates(shape_of(blob(), tolerance)) for tolerance in (0, 1)]
    assert corners[1] < corners[0] / 4


def test_holes_are_inner_rings_and_rings_turn_as_the_rfc_has_it() -> None:
    for tolerance in (0, 1):
        geometry = with_masks(blob()[None]).to_geojson(tolerance)["features"][0]["geometry"]
        assert geometry["type"] == "MultiPolygon"
        assert sorted(len(polygon) for polygon in geometry["coordinates"]) == [1, 3]
        for polygon in geometry["coordinates"]:
            for index, ring in enumerate(polygon):
                assert ring[0] == ring[-1]
                assert shapely.LinearRing(ring).is_ccw == (index == 0)


def test_geojson_tells_what_the_regions_are() -> None:
    collection = made_up().to_geojson()
    assert json.loads(json.dumps(collection)) == collection
    assert collection["type"] == "FeatureCollection"
    first, second = collection["features"]
    assert (first["type"], first["id"]) == ("Feature", 0)
    assert first["geometry"]["type"] == "Polygon"
    assert shapely.from_geojson(json.dumps(first["geometry"])).bounds == (10, 5, 16, 9)
    assert first["properties"] == {
        "name": "Bär",
        "probability": 0.75,
        "caption": "a brown bear",
        "iou_prediction": 0.9,
    }
    assert second["geometry"] is None  # RFC 7946: null for a feature without a location
    assert second["properties"]["name"] == "cup"


def test_what_was_not_computed_is_null() -> None:
    regions = made_up(concepts=None, captions=None, iou_predictions=np.array([np.nan, 1]))
    properties = regions.to_geojson()["features"][0]["properties"]
    assert set(properties) == {"name", "probability", "caption", "iou_prediction"}
    assert not any(properties.values())


@pytest.mark.parametrize("tolerance", [0, 1])
def test_empty_masks_have_no_polygons(tolerance: float) -> None:
    assert with_masks(np.zeros((2, 5, 4), np.bool_)).to_polygons(tolerance) == [[], []]
    assert empty().to_polygons(tolerance) == []
    assert empty().to_geojson(tolerance) == {"type": "FeatureCollection", "features": []}


def test_run_lengths_serve_as_well_as_masks() -> None:
    regions = with_masks(blob()[None])
    assert with_rles(regions).to_polygons(1) == regions.to_polygons(1)
    assert with_rles(regions).to_geojson(1) == regions.to_geojson(1)


@pytest.mark.parametrize("tolerance", [-1, math.nan, math.inf, "1", None])
def test_a_tolerance_that_is_none_is_refused(tolerance: Any) -> None:
    for export in (made_up().to_polygons, made_up().to_geojson, empty().to_polygons):
        with pytest.raises(InputError, match=r"tolerance is .*; expected a number of pixels"):
            export(tolerance)


def test_a_tolerance_of_numpy_is_a_number() -> None:
    regions = with_masks(blob()[None])
    assert regions.to_polygons(np.float32(1)) == regions.to_polygons(1)


def test_polygons_need_masks() -> None:
    regions = made_up(masks=None)
    with pytest.raises(InputError, match=r"polygons needs; predict with masks=True or 'rle'"):
        regions.to_polygons()
    with pytest.raises(InputError, match=r"GeoJSON needs; predict with masks=True or 'rle'"):
        regions.to_geojson()


def test_polygons_name_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shapely", None)
    for export in (made_up().to_polygons, made_up().to_geojson):
        with pytest.raises(MissingDependencyError, match=r'pip install "tap-deploy\[polygons\]"'):
            export()
