"""TapPredictor.everything: points, filters, crops, names, memory; on flat colours and a model."""

from __future__ import annotations

import functools
import tracemalloc

import numpy as np
import pytest

from tap_deploy import Prompts, TapPredictor, Vocabulary
from tap_deploy.errors import InputError
from tap_deploy.masks import mask_from_rle, mask_iou
from tap_deploy.prediction.suppression import stability_scores
from tap_deploy.prediction.views import crop_boxes, grid_points
from tests.flat_model import NAMES, flat_predictor, flat_vocabulary, painted

HEIGHT, WIDTH = 384, 512  # fills the model frame of 512 pixels without scaling
PLACES = {"ball": (40, 40, 120, 120), "box": (200, 64, 440, 320), "stick": (24, 200, 152, 328)}
KEEP_ALL = {"pred_iou_thresh": -9.0, "stability_score_thresh": 0.0}
NO_NMS = {"box_nms_thresh": 1.0, "mask_nms_thresh": 1.0}


@pytest.fixture
def flat(micro_config):
    return flat_predictor(micro_config)


@pytest.fixture
def picture():
    return painted(HEIGHT, WIDTH, **PLACES)


@pytest.fixture(scope="session")
def rgb(golden):
    return np.ascontiguousarray(golden["image_bgr_0"][..., ::-1])


def names(regions):
    return [regions.name(index) for index in range(len(regions))]


def test_points_are_the_centres_of_cells():
    assert grid_points(300, 200, 2).tolist() == [[75, 50], [225, 50], [75, 150], [225, 150]]
    assert grid_points(300, 200, 1).tolist() == [[150, 100]]


def test_crops_by_hand():
    assert crop_boxes(200, 300, 0, 0.3) == [(0, 0, 300, 200)]
    # Overlap: 0.3 * 200 = 60 in layer 1, 30 in layer 2.
    assert crop_boxes(200, 300, 1, 0.3) == [
        (0, 0, 180, 130),
        (120, 0, 300, 130),
        (0, 70, 180, 200),
        (120, 70, 300, 200),
    ]
    layer = crop_boxes(200, 300, 2, 0.3)
    assert len(layer) == 16
    assert layer[:4] == [(0, 0, 98, 73), (68, 0, 166, 73), (136, 0, 234, 73), (204, 0, 300, 73)]
    assert layer[-1] == (204, 129, 300, 200)


@pytest.mark.parametrize(("height", "width", "layer"), [(97, 331, 1), (501, 77, 2), (640, 480, 3)])
def test_crops_cover_the_picture(height, width, layer):
    covered = np.zeros((height, width), np.bool_)
    for x0, y0, x1, y1 in crop_boxes(height, width, layer, 0.0):
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        covered[y0:y1, x0:x1] = True
    assert covered.all()


def test_crops_must_not_be_tiny():
    with pytest.raises(InputError, match="crops of layer 3 would be 13 x 8; expected at least 16"):
        crop_boxes(64, 100, 3, 0.0)
    with pytest.raises(InputError, match="expected at least 16"):
        crop_boxes(64, 100, 1, 1.0)


def test_every_object_is_found_once_best_first(flat, picture):
    regions = flat.everything(picture)
    assert names(regions) == ["ball", "box", "stick"]  # the ground scores 0.3
    assert regions.iou_predictions.tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert regions.masks is None
    for index, name in enumerate(names(regions)):
        assert mask_iou(regions.mask(index), painted_mask(name)) > 0.999  # corners are rounded
        x, y = regions.prompts.coords[index, 0].astype(int)
        assert painted_mask(name)[y, x]
    assert regions.prompts.labels.tolist() == [[1, 4]] * 3


def painted_mask(name):
    x0, y0, x1, y1 = PLACES[name]
    mask = np.zeros((HEIGHT, WIDTH), np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


def test_filters_drop_what_they_must(flat, picture):
    assert names(flat.everything(picture, pred_iou_thresh=0.75)) == ["ball", "box"]
    assert names(flat.everything(picture, pred_iou_thresh=0.2))[-1] == "ground"
    assert len(flat.everything(picture, pred_iou_thresh=0.9)) == 0  # above, not at
    # All logits are 4 or -4.
    assert len(flat.everything(picture, stability_score_thresh=1.0)) == 3
    assert len(flat.everything(picture, stability_score_offset=4.5)) == 0
    assert len(flat.everything(picture, stability_score_offset=4.5, **KEEP_ALL)) == 4


def test_stability_ignores_the_padding(flat, micro_config, picture, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "tap_deploy.prediction.everything.stability_scores",
        lambda logits, offset: seen.append(logits.shape[1:]) or stability_scores(logits, offset),
    )
    flat.everything(picture, points_per_side=4)
    assert set(seen) == {(HEIGHT // 4, WIDTH // 4)}


def test_without_suppression_each_point_remains(flat, picture):
    regions = flat.everything(picture, points_per_side=8, **KEEP_ALL, **NO_NMS)
    assert len(regions) == 64
    assert (np.diff(regions.iou_predictions) <= 0).all()
    first = regions.prompts.coords[regions.iou_predictions == regions.iou_predictions[0], 0]
    assert first.tolist() == sorted(first.tolist(), key=lambda xy: (xy[1], xy[0]))  # row by row


def test_results_equal_those_of_predict_on_the_same_points(predictor, rgb):
    found = predictor.everything(rgb, points_per_side=6, top_k=3, **KEEP_ALL, **NO_NMS)
    expected = predictor.predict(rgb, prompts=found.prompts, top_k=3, masks="rle")
    assert len(found) > 20  # masks without pixels are dropped
    assert found.to_json() == expected.to_json()
    np.testing.assert_array_equal(found.low_res_masks, expected.low_res_masks)
    assert found.image_path is None


@pytest.mark.parametrize("thresholds", [(-0.45, 0.5, 1.0, 0.5), (-0.5, 0.3, 1.0, 0.8)])
def test_selection_equals_its_definition(predictor, rgb, thresholds):
    iou_thresh, stability_thresh, box_thresh, mask_thresh = thresholds
    height, width = rgb.shape[:2]
    points = [[[x, y, 1]] for x, y in grid_points(width, height, 10)]
    everything = predictor.predict(rgb, points, captions=False)
    rows = -(-round(height * 512 / width) // 4)  # logits below are padding
    logits = everything.low_res_masks[:, :rows]
    ratio = [mask_iou(one > 0.1, one > -0.1) for one in logits]
    candidates = [
        index
        for index in np.argsort(-everything.iou_predictions, kind="stable")
        if everything.iou_predictions[index] > iou_thresh
        and ratio[index] >= stability_thresh
        and (logits[index] > 0).any()
    ]
    kept = greedy(logits > 0, candidates, box_thresh, mask_thresh)
    found = predictor.everything(
        rgb,
        points_per_side=10,
        pred_iou_thresh=iou_thresh,
        stability_score_thresh=stability_thresh,
        stability_score_offset=0.1,
        box_nms_thresh=box_thresh,
        mask_nms_thresh=mask_thresh,
        captions=False,
    )
    assert 100 > len(candidates) > len(kept) > 1
    assert found.prompts.coords.tolist() == everything.prompts[kept].coords.tolist()


def greedy(masks, order, box_thresh, mask_thresh):
    def boxed(mask):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        full = np.zeros_like(mask)
        full[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        return full

    kept = []
    for index in order:
        ious = [mask_iou(masks[index], masks[best]) for best in kept]
        box_ious = [mask_iou(boxed(masks[index]), boxed(masks[best])) for best in kept]
        if max(ious, default=0) <= mask_thresh and max(box_ious, default=0) <= box_thresh:
            kept.append(index)
    return kept


def test_chunks_change_nothing(micro_config, picture, micro_bundle, predictor, rgb):
    expected = flat_predictor(micro_config).everything(picture, points_per_side=9)
    for most in (1, 7, 81):
        flat = flat_predictor(micro_config, max_prompts=most)
        assert flat.everything(picture, points_per_side=9).to_json() == expected.to_json()
        assert max(flat._pipeline.the_lane.decoded) == most
    search = functools.partial(dict, points_per_side=5, captions=False, **KEEP_ALL)
    once = predictor.everything(rgb, **search())
    assert predictor.everything(rgb, **search()).to_json() == once.to_json()
    with TapPredictor.from_bundle(micro_bundle.path, memory_limit_bytes=1) as small:
        found = small.everything(rgb, **search())
    assert found.prompts.coords.tolist() == once.prompts.coords.tolist()


def test_crops_find_small_objects_and_nothing_twice(micro_config):
    """A grid of 4 x 4 misses both small objects; that of a crop does not."""
    big, small, corner = (150, 40, 490, 230), (10, 300, 40, 330), (476, 352, 512, 384)
    picture = painted(HEIGHT, WIDTH, box=big, ball=small, stick=corner)
    flat = flat_predictor(micro_config)
    assert names(flat.everything(picture, points_per_side=4)) == ["box"]
    regions = flat.everything(picture, points_per_side=13, crop_n_layers=1)
    assert names(regions) == ["ball", "box", "stick"]
    for index, (x0, y0, x1, y1) in enumerate([small, big, corner]):
        mask = np.zeros((HEIGHT, WIDTH), np.bool_)
        mask[y0:y1, x0:x1] = True
        assert mask_iou(regions.mask(index), mask) > 0.85
        low = regions.low_res_masks[index] > 0  # one logit per 4 x 4 pixels
        assert mask_iou(np.kron(low[: HEIGHT // 4], np.ones((4, 4), np.bool_)), mask) > 0.6
        x, y = regions.prompts.coords[index, 0].astype(int)
        assert mask[y, x]
    assert regions.rles[0]["size"] == [HEIGHT, WIDTH]


def test_what_a_crop_cuts_off_is_dropped(micro_config):
    """The box spans all crops, whose parts of it are no objects."""
    picture = painted(HEIGHT, WIDTH, box=(100, 100, 400, 300))
    regions = flat_predictor(micro_config).everything(
        picture, crop_n_layers=1, points_per_side=8, **NO_NMS, crop_nms_thresh=1.0
    )
    assert len(regions) > 1
    assert all(abs(regions.area(index) - 300 * 200) < 100 for index in range(len(regions)))


def test_regions_of_crops_equal_those_of_the_cropped_picture(flat):
    picture = painted(HEIGHT, WIDTH, ball=(20, 24, 60, 72), stick=(380, 300, 430, 350))
    regions = flat.everything(picture, crop_n_layers=1, masks=True, crop_nms_thresh=0.01)
    assert names(regions) == ["ball", "stick"]
    crops = crop_boxes(HEIGHT, WIDTH, 1, 512 / 1500)
    for index, (x0, y0, x1, y1) in enumerate([crops[0], crops[3]]):
        own = flat.everything(picture[y0:y1, x0:x1])
        assert names(own) == [regions.name(index)]
        expected = np.zeros((HEIGHT, WIDTH), np.bool_)
        expected[y0:y1, x0:x1] = own.mask(0)
        np.testing.assert_array_equal(regions.mask(index), expected)
        found, alone = regions.prompts.coords[index, 0], own.prompts.coords[0, 0]
        np.testing.assert_allclose(found, alone + np.array([x0, y0]), rtol=0, atol=1e-4)


def test_crops_need_the_picture(flat, picture):
    flat.set_image(picture)
    with pytest.raises(InputError, match="crop_n_layers is 1 and the picture is already encoded"):
        flat.everything(crop_n_layers=1)


def test_points_of_crops_can_be_fewer(micro_config, picture):
    flat = flat_predictor(micro_config)
    flat.everything(picture, points_per_side=9, crop_n_layers=2, crop_n_points_downscale_factor=2)
    grids = [number for number in flat._pipeline.the_lane.decoded if number > 3]
    assert grids == [81, *[16] * 4, *[4] * 16]


def test_only_these_names(micro_config, picture):
    flat = flat_predictor(micro_config)
    everything = flat.everything(picture)
    only = flat.everything(picture, only=["stick", "ball"])
    assert names(only) == ["ball", "stick"]
    assert only.to_json() == everything.matching(["stick", "ball"], 0.3).to_json()
    assert flat._pipeline.the_lane.captioned == [3, 2]  # the filter comes first
    flat.vocabulary = Vocabulary(weights=flat.vocabulary.weights / 20, names=NAMES)
    # exp(1) / (exp(1) + 3) = 0.475
    assert len(flat.everything(picture, only=["ball"], only_thresh=0.47)) == 1
    assert len(flat.everything(picture, only=["ball"], only_thresh=0.48)) == 0
    assert len(flat.everything(picture, only=["ground"])) == 0
    renamed = flat_vocabulary(micro_config).merged({"toy": ["ball", "stick"]})
    assert names(flat.everything(picture, only=["toy"], vocabulary=renamed)) == ["toy", "toy"]


def test_wrong_names(flat, micro_config, picture):
    with pytest.raises(InputError, match=r"'bal' is none of the 4 names .*; it has 'ball'; to add"):
        flat.everything(picture, only=["bal"])
    with pytest.raises(InputError, match="only is 'ball'; expected a list of names"):
        flat.everything(picture, only="ball")
    with pytest.raises(InputError, match=r"only is \[\]; expected a list"):
        flat.everything(picture, only=[])
    flat.vocabulary = None
    with pytest.raises(InputError, match="only needs names, and there is no vocabulary"):
        flat.everything(picture, only=["ball"])
    regions = flat.everything(picture)
    assert regions.concepts is None
    with pytest.raises(InputError, match="the regions have no names; predict with a vocabulary"):
        regions.matching("ball", 0.5)


def test_matching(flat, picture):
    regions = flat.predict(picture, [[[x, 80, 1]] for x in (10, 80, 300)], masks=True)
    assert names(regions) == ["ground", "ball", "box"]
    found = regions.matching("box", 0.5)
    assert (names(found), found.captions) == (["box"], None)
    np.testing.assert_array_equal(found.masks, regions.masks[2:])
    assert found.prompts.coords[0, 0].tolist() == [300, 80]
    assert len(regions.matching("box", 0.0)) == 3
    assert names(regions.take([2, 0])) == ["box", "ground"]
    assert len(regions.take([])) == 0
    with pytest.raises(InputError, match=r"'Box' is none of the 4 names .*; it has 'box'"):
        regions.matching("Box", 0.5)
    with pytest.raises(InputError, match="threshold is 50; expected a number from 0 to 1"):
        regions.matching("box", 50)


def test_captions_can_be_turned_off(flat, picture):
    flat.everything(picture, captions=False)
    assert flat._pipeline.the_lane.captioned == [0]


def test_masks_in_each_form(flat, picture):
    rles = flat.everything(picture).rles
    masks = flat.everything(picture, masks=True)
    assert masks.rles is None
    np.testing.assert_array_equal(masks.masks, [mask_from_rle(rle) for rle in rles])
    none = flat.everything(picture, masks=False)
    assert (none.masks, none.rles) == (None, None)


def test_encoded_pictures_and_paths(flat, picture, tmp_path):
    from PIL import Image

    Image.fromarray(picture).save(tmp_path / "a.png")
    expected = flat.everything(picture).to_json()
    found = flat.everything(tmp_path / "a.png")
    assert (found.image_path, found.to_json()) == (str(tmp_path / "a.png"), expected)
    cropped = flat.everything(tmp_path / "a.png", crop_n_layers=1)
    assert cropped.image_path == str(tmp_path / "a.png")
    flat.set_image(picture)
    assert flat.everything().to_json() == expected


def test_progress_counts_points(micro_config, picture):
    reports = []
    flat_predictor(micro_config, max_prompts=40).everything(
        picture,
        points_per_side=8,
        crop_n_layers=1,
        on_progress=lambda *report: reports.append(report),
    )
    searched = [done for stage, done, total in reports if stage == "search points" and total == 320]
    assert searched == [0, 40, 64, 104, 128, 168, 192, 232, 256, 296]
    stages = list(dict.fromkeys(stage for stage, _, _ in reports))
    assert stages == ["encode image", "search points", "write captions", "make masks"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points_per_side": 0}, "points_per_side is 0; expected a whole number of at least 1"),
        ({"crop_n_layers": -1}, "crop_n_layers is -1; expected a whole number"),
        ({"crop_n_points_downscale_factor": 0}, "crop_n_points_downscale_factor is 0"),
        ({"pred_iou_thresh": float("nan")}, "pred_iou_thresh is nan; expected a number"),
        ({"stability_score_offset": -1}, "stability_score_offset is -1; expected a number of at"),
        ({"stability_score_thresh": 95}, "stability_score_thresh is 95; expected a number from 0"),
        ({"box_nms_thresh": "0.7"}, "box_nms_thresh is '0.7'; expected a number from 0 to 1"),
        ({"mask_nms_thresh": None}, "mask_nms_thresh is None; expected a number from 0 to 1"),
        ({"crop_nms_thresh": -0.1}, "crop_nms_thresh is -0.1; expected a number from 0 to 1"),
        ({"crop_overlap_ratio": 2}, "crop_overlap_ratio is 2; expected a number from 0 to 1"),
        ({"only_thresh": 1.5}, "only_thresh is 1.5; expected a number from 0 to 1"),
        ({"masks": "png"}, "masks is 'png'"),
    ],
)
def test_wrong_options(flat, picture, options, message):
    with pytest.raises(InputError, match=message):
        flat.everything(picture, **options)


def test_memory_is_that_of_166_boxes(predictor, rgb):
    height, width = rgb.shape[:2]
    boxes = np.tile([10, 10, width - 10, height - 10], (166, 1))
    allowed = 1.2 * peak_bytes(lambda: predictor.predict(rgb, boxes=boxes, captions=False))
    kept = []

    def search():
        kept.append(
            predictor.everything(
                rgb,
                pred_iou_thresh=-0.29,
                stability_score_thresh=0.0,
                **NO_NMS,
                captions=False,
            )
        )

    assert peak_bytes(search) <= allowed
    assert 60 < len(kept[0]) <= 166  # of 1,024 points


def peak_bytes(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_prompts_by_list():
    prompts = Prompts.from_points([[[x, 0, 1]] for x in range(5)])
    assert prompts[[3, 1]].coords[:, 0, 0].tolist() == [3, 1]
    assert prompts[np.int64(2)].coords[:, 0, 0].tolist() == [2]
    assert len(prompts[[]]) == 0
