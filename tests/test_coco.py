"""COCO annotations, data sets and results, read by pycocotools."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

coco_mask = pytest.importorskip("pycocotools.mask")
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tap_deploy.errors import InputError, MissingDependencyError
from tap_deploy.formats.coco import coco_dataset
from tap_deploy.regions import Regions
from tests.made_regions import HEIGHT, WIDTH, made_up, with_masks, with_rles

# pycocotools does not speak NumPy 2's __array__ yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NAMES = ["cup", "dog", "Bär", "cat", "cow"]


def loaded(data: dict[str, Any], folder: Path) -> COCO:
    file = folder / "data.json"
    file.write_text(json.dumps(data), "utf-8")
    return COCO(str(file))


def rectangles(seed: int, height: int = HEIGHT, width: int = WIDTH) -> npt.NDArray[np.bool_]:
    """Three masks: rectangles with a corner cut off, so that their boxes are larger."""
    random = np.random.default_rng(seed)
    masks = np.zeros((3, height, width), np.bool_)
    for mask in masks:
        y, x = random.integers(0, height - 8), random.integers(0, width - 8)
        mask[y : y + random.integers(4, 9), x : x + random.integers(4, 9)] = True
        mask[y : y + 2, x : x + 2] = False
    return masks


def five_pictures() -> list[tuple[str, Regions]]:
    """Pictures of different sizes with three regions each: fifteen annotations."""
    return [
        (
            f"{seed}.jpg",
            with_masks(
                rectangles(seed, HEIGHT + seed, WIDTH + 2 * seed),
                names=[NAMES[seed], "dog", NAMES[seed]],
                captions=[f"region {index} of picture {seed}" for index in range(3)],
            ),
        )
        for seed in range(5)
    ]


def test_coco_annotations_restore_the_masks() -> None:
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
    assert [a["category_id"] for a in regions.to_coco()] == [1, 1]
    ids = {"Bär": 10, "cup": 11}
    assert [a["category_id"] for a in regions.to_coco(category_ids=ids)] == [10, 11]
    with pytest.raises(InputError, match=r"region 0 is 'Bär', which has no category id"):
        regions.to_coco(category_ids={"something": 1})


def test_a_region_without_a_name_gets_no_id_that_means_something_else() -> None:
    regions = made_up(concepts=None)
    with pytest.raises(InputError, match=r"region 0 has no name.*leave out category_ids"):
        regions.to_coco(category_ids={"cup": 1})
    annotations = regions.to_coco(category_ids={"cup": 1, "region": 2})
    assert [annotation["category_id"] for annotation in annotations] == [2, 2]


def test_ids_count_from_the_first_one() -> None:
    assert [a["id"] for a in made_up().to_coco()] == [1, 2]
    assert [a["id"] for a in made_up().to_coco(first_id=7)] == [7, 8]
    assert json.loads(json.dumps(made_up().to_coco(first_id=np.int64(7))))[1]["id"] == 8


@pytest.mark.parametrize("first_id", [0, True, 1.0])
def test_ids_that_evaluation_misreads_are_refused(first_id: Any) -> None:
    with pytest.raises(InputError, match=r"first_id is .*at least 1"):
        made_up().to_coco(first_id=first_id)


def test_run_lengths_give_the_same_coco() -> None:
    assert with_rles().to_coco() == made_up().to_coco()
    assert with_rles().to_coco_results(1) == made_up().to_coco_results(1)


def test_coco_leaves_out_what_was_not_computed() -> None:
    annotation = made_up(concepts=None, captions=None).to_coco()[0]
    assert "category_name" not in annotation
    assert "caption" not in annotation


def test_coco_needs_masks() -> None:
    blind = made_up(masks=None)
    with pytest.raises(InputError, match=r"COCO needs; predict with masks=True or 'rle'"):
        blind.to_coco()
    with pytest.raises(InputError, match=r"COCO needs; predict with masks=True or 'rle'"):
        blind.to_coco_results(1)
    with pytest.raises(InputError, match=r"^b.jpg: the regions have no masks"):
        coco_dataset([("a.jpg", made_up()), ("b.jpg", blind)])


def test_coco_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    for export in (made_up().to_coco, lambda: made_up().to_coco_results(1)):
        with pytest.raises(MissingDependencyError, match=r'pip install "tap-deploy\[coco\]"'):
            export()


def test_every_annotation_of_many_pictures_is_kept_on_its_picture(tmp_path: Path) -> None:
    pictures = five_pictures()
    coco = loaded(coco_dataset(pictures), tmp_path)
    assert len(set(coco.getAnnIds())) == 15
    for file_name, regions in pictures:
        (image,) = (image for image in coco.imgs.values() if image["file_name"] == file_name)
        assert (image["width"], image["height"]) == (regions.image_width, regions.image_height)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]]))
        assert len(annotations) == 3
        assert regions.masks is not None and regions.captions is not None
        for index, annotation in enumerate(annotations):
            np.testing.assert_array_equal(coco.annToMask(annotation), regions.masks[index])
            assert annotation["caption"] == regions.captions[index]
            (category,) = coco.loadCats([annotation["category_id"]])
            assert category["name"] == annotation["category_name"] == regions.name(index)


def test_the_names_that_occur_are_the_categories() -> None:
    categories = coco_dataset(five_pictures())["categories"]
    assert categories == [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)]
    nameless = [("a.jpg", made_up(concepts=None)), ("b.jpg", made_up(concepts=None))]
    assert coco_dataset(nameless)["categories"] == [{"id": 1, "name": "region"}]


def test_named_and_nameless_regions_do_not_share_a_category() -> None:
    data = coco_dataset([("a.jpg", made_up()), ("b.jpg", made_up(concepts=None))])
    assert [category["name"] for category in data["categories"]] == ["Bär", "cup", "region"]
    assert [annotation["category_id"] for annotation in data["annotations"]] == [1, 2, 3, 3]


def test_given_categories_are_all_there() -> None:
    ids = {"cup": 3, "Bär": 1, "unseen": 7}
    data = coco_dataset([("a.jpg", made_up())], category_ids=ids)
    assert data["categories"] == [{"id": number, "name": name} for name, number in ids.items()]
    assert [annotation["category_id"] for annotation in data["annotations"]] == [1, 3]
    with pytest.raises(InputError, match=r"^a.jpg: region 1 is 'cup', which has no category id"):
        coco_dataset([("a.jpg", made_up())], category_ids={"Bär": 1})
    with pytest.raises(InputError, match=r"'Bär' and 'cup' both have id 1"):
        coco_dataset([("a.jpg", made_up())], category_ids={"Bär": 1, "cup": 1})


def test_parts_of_a_data_set_can_be_joined(tmp_path: Path) -> None:
    pictures = five_pictures()
    ids = {name: number for number, name in enumerate(NAMES, 1)}
    whole = coco_dataset(pictures, category_ids=ids)
    first = coco_dataset(pictures[:2], category_ids=ids)
    second = coco_dataset(pictures[2:], category_ids=ids, first_image_id=3, first_annotation_id=7)
    joined = first | {key: first[key] + second[key] for key in ("images", "annotations")}
    assert joined == whole
    assert len(set(loaded(joined, tmp_path).getAnnIds())) == 15


def test_pictures_are_taken_one_at_a_time() -> None:
    alive: weakref.WeakSet[Regions] = weakref.WeakSet()
    most = 0

    def pictures() -> Iterator[tuple[str, Regions]]:
        nonlocal most
        for index in range(8):
            regions = made_up()
            alive.add(regions)
            most = max(most, len(alive))
            yield f"{index}.jpg", regions

    assert len(coco_dataset(pictures())["annotations"]) == 16
    assert most <= 2  # the one at hand, and the one before it


def test_perfect_results_score_1(tmp_path: Path) -> None:
    pictures = five_pictures()
    truth = loaded(coco_dataset(pictures), tmp_path)
    ids = {category["name"]: category["id"] for category in truth.loadCats(truth.getCatIds())}
    results = [
        result
        for image_id, (_, regions) in enumerate(pictures, 1)
        for result in regions.to_coco_results(image_id, ids)
    ]
    found = truth.loadRes(json.loads(json.dumps(results)))
    assert found.getCatIds() == truth.getCatIds()
    assert [a["area"] for a in found.anns.values()] == [a["area"] for a in truth.anns.values()]
    for kind in ("segm", "bbox"):
        evaluation = COCOeval(truth, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == 1.0


def test_a_result_without_a_score_is_refused() -> None:
    scores = np.array([0.5, np.nan], np.float32)
    with pytest.raises(InputError, match=r"region 1 has the IoU prediction nan"):
        made_up(iou_predictions=scores).to_coco_results(1)


def test_ids_of_numpy_can_be_written_as_json() -> None:
    regions, ids = made_up(), {"Bär": np.int64(3), "cup": np.int64(4)}
    for values in (
        regions.to_coco(np.int64(7), ids, np.int64(5)),
        regions.to_coco_results(np.int64(7), ids),
    ):
        assert json.loads(json.dumps(values))[0]["image_id"] == 7


def test_paths_are_file_names(tmp_path: Path) -> None:
    dataset = coco_dataset([(tmp_path / "a.png", made_up())])
    assert json.loads(json.dumps(dataset))["images"][0]["file_name"] == str(tmp_path / "a.png")
