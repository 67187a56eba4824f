"""Regions: consistency, JSON, run lengths."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tap_deploy.errors import InputError
from tap_deploy.masks import rle_from_mask
from tests.made_regions import HEIGHT, WIDTH, empty, made_up, with_rles


def test_json_tells_everything_but_the_tensors() -> None:
    regions = made_up()
    text = regions.to_json()
    assert "Bär" in text
    assert "\n" not in text
    content = json.loads(text)
    assert content == regions.to_dict()
    assert content["image"] == {"height": HEIGHT, "width": WIDTH}
    first, second = content["regions"]
    assert first["index"] == 0
    assert first["points"] == [[12, 6.5, 1]]
    assert first["iou_prediction"] == 0.9
    assert first["mask_index"] == 2
    assert first["concepts"][0] == {"name": "Bär", "probability": 0.75}
    assert first["caption"] == "a brown bear"
    assert first["caption_ids"] == [1, 7, 8, 2]
    assert first["bbox"] == [10, 5, 6, 4]
    assert first["area"] == 24
    counts = first["segmentation"]["counts"]
    assert counts[:3] == [10 * HEIGHT + 5, 4, 16]
    assert sum(counts) == HEIGHT * WIDTH
    assert second["points"] == [[1, 2, 2], [9, 8, 3]]
    assert (second["area"], second["bbox"]) == (0, [0, 0, 0, 0])
    assert second["segmentation"]["counts"] == [HEIGHT * WIDTH]


def test_json_says_null_for_what_was_not_computed() -> None:
    regions = made_up(masks=None, concepts=None, captions=None, caption_ids=None)
    region = json.loads(regions.to_json())["regions"][0]
    for key in ("bbox", "area", "segmentation", "concepts", "caption", "caption_ids"):
        assert region[key] is None


def test_json_stays_valid_when_a_score_is_nan() -> None:
    regions = made_up(iou_predictions=np.array([np.nan, np.inf], np.float32))
    content = json.loads(regions.to_json(), parse_constant=pytest.fail)
    assert [region["iou_prediction"] for region in content["regions"]] == [None, None]


def test_run_lengths_serve_as_well_as_masks() -> None:
    by_mask, by_rle = made_up(), with_rles()
    assert by_rle.to_json() == by_mask.to_json()
    for index in range(2):
        assert by_mask.masks is not None
        np.testing.assert_array_equal(by_rle.mask(index), by_mask.masks[index])
        assert by_mask.rle(index) == by_rle.rle(index)
    assert (by_rle.box(0), by_rle.area(0)) == (by_mask.box(0), by_mask.area(0))
    assert (by_rle.box(0), by_rle.area(0)) == ([10, 5, 6, 4], 24)


@pytest.mark.parametrize("scale", [1, 3])
def test_run_lengths_are_drawn_as_masks_are(scale: int) -> None:
    picture = np.full((HEIGHT, WIDTH, 3), 7, np.uint8)
    drawn = [regions.visualize(picture, scale) for regions in (made_up(), with_rles())]
    np.testing.assert_array_equal(np.asarray(drawn[0]), np.asarray(drawn[1]))
    assert np.asarray(made_up(masks=None).visualize(picture, scale)).max() > 7


def test_without_masks_there_is_no_box_and_no_area() -> None:
    regions = made_up(masks=None)
    answers = [ask(0) for ask in (regions.mask, regions.rle, regions.box, regions.area)]
    assert answers == [None] * 4


def test_run_lengths_of_another_picture_are_refused() -> None:
    rles = [rle_from_mask(np.zeros((WIDTH, HEIGHT), bool))] * 2
    with pytest.raises(InputError, match="size of the picture"):
        made_up(masks=None, rles=rles)
    with pytest.raises(InputError, match="rles has 1 entries; expected 2"):
        made_up(masks=None, rles=rles[:1])


def test_no_regions_are_fine() -> None:
    regions = empty()
    assert len(regions) == 0
    assert json.loads(regions.to_json())["regions"] == []
    picture = regions.visualize(np.full((HEIGHT, WIDTH, 3), 7, np.uint8))
    assert np.asarray(picture).min() == np.asarray(picture).max() == 7


@pytest.mark.parametrize(
    "field",
    ["masks", "iou_predictions", "mask_index", "concepts", "captions", "low_res_masks"],
)
def test_a_field_without_one_entry_per_prompt_is_refused(field: str) -> None:
    with pytest.raises(InputError, match=f"{field} has 1 entries; expected 2"):
        made_up(**{field: getattr(made_up(), field)[:1]})


def test_masks_of_another_size_are_refused() -> None:
    with pytest.raises(InputError, match="size of the picture"):
        made_up(masks=np.zeros((2, WIDTH, HEIGHT), np.bool_))
