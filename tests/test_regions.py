"""Regions: consistency, JSON, COCO."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tap_deploy.errors import InputError, MissingDependencyError
from tap_deploy.masks import rle_from_mask
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions

HEIGHT, WIDTH = 20, 30


def made_up(**changes: Any) -> Regions:
    """Two regions: a rectangle prompted by a point, and one without a mask by a box."""
    masks = np.zeros((2, HEIGHT, WIDTH), np.bool_)
    masks[0, 5:9, 10:16] = True
    fields: dict[str, Any] = {
        "masks": masks,
        "iou_predictions": np.array([0.9, 0.25], np.float32),
        "mask_index": np.array([2, 0]),
        "concepts": [[("Bär", 0.75), ("dog", 0.125)], [("cup", 0.5)]],
        "captions": ["a brown bear", "a cup"],
        "caption_ids": np.array([[1, 7, 8, 2], [1, 9, 2, 499]]),
        "semantic_tokens": np.zeros((2, 8), np.float32),
        "semantic_embeddings": np.zeros((2, 12), np.float32),
        "low_res_masks": np.zeros((2, 4, 4), np.float32),
        "prompts": Prompts.concatenate(
            [Prompts.from_points([[[12, 6.5, 1]]]), Prompts.from_boxes([[1, 2, 9, 8]])]
        ),
        "image_height": HEIGHT,
        "image_width": WIDTH,
    }
    return Regions(**(fields | changes))


def empty() -> Regions:
    regions = made_up()
    cut = {
        field.name: value[:0]
        for field in dataclasses.fields(regions)
        if not isinstance(value := getattr(regions, field.name), int | None)
    }
    return made_up(**cut)


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


# pycocotools does not speak NumPy 2's __array__ yet.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_coco_annotations_restore_the_masks() -> None:
    coco_mask = pytest.importorskip("pycocotools.mask")
    regions = made_up()
    annotations = regions.to_coco(image_id=42)
    json.dumps(annotations)
    assert regions.masks is not None
    for mask, annotation in zip(regions.masks, annotations, strict=True):
        assert isinstance(annotation["segmentation"]["counts"], str)
        assert annotation["image_id"] == 42
        np.testing.assert_array_equal(coco_mask.decode(annotation["segmentation"]), mask)
    first = annotations[0]
    assert (first["bbox"], first["area"]) == ([10, 5, 6, 4], 24)
    assert first["score"] == 0.9
    assert first["category_name"] == "Bär"
    assert first["caption"] == "a brown bear"


def test_coco_categories() -> None:
    regions = made_up()
    names = [row[0][0] for row in regions.concepts or []]
    assert [a["category_id"] for a in regions.to_coco()] == [1, 1]
    ids = {name: 10 + i for i, name in enumerate(names)}
    assert [a["category_id"] for a in regions.to_coco(category_ids=ids)] == list(ids.values())
    with pytest.raises(InputError, match=r"has no category id"):
        regions.to_coco(category_ids={"something": 1})


def test_coco_data_set_loads(tmp_path: Path) -> None:
    """The reader that everybody uses takes a file made of the annotations."""
    coco = pytest.importorskip("pycocotools.coco")
    file = tmp_path / "data.json"
    data = {
        "images": [{"id": 1, "height": HEIGHT, "width": WIDTH, "file_name": "a.jpg"}],
        "categories": [{"id": 1, "name": "region"}],
        "annotations": made_up().to_coco(image_id=1),
    }
    file.write_text(json.dumps(data), "utf-8")
    assert len(coco.COCO(str(file)).getAnnIds(imgIds=[1], catIds=[1])) == 2


def with_rles() -> Regions:
    """The same regions with run lengths in place of masks."""
    masks = made_up().masks
    assert masks is not None
    return made_up(masks=None, rles=[rle_from_mask(mask) for mask in masks])


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


# pycocotools does not speak NumPy 2's __array__ yet.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_run_lengths_give_the_same_coco() -> None:
    pytest.importorskip("pycocotools.mask")
    assert with_rles().to_coco() == made_up().to_coco()


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


def test_coco_leaves_out_what_was_not_computed() -> None:
    pytest.importorskip("pycocotools.mask")
    annotation = made_up(concepts=None, captions=None).to_coco()[0]
    assert "category_name" not in annotation
    assert "caption" not in annotation


def test_coco_needs_masks() -> None:
    with pytest.raises(InputError, match="masks=True"):
        made_up(masks=None).to_coco()


def test_coco_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "tap-deploy\[coco\]"'):
        made_up().to_coco()


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
