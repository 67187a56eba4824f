"""Evaluation pictures are held out by content, and evaluation regions are valid."""

from __future__ import annotations

import hashlib
import pathlib

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")
from tap_deploy.engines.calibration.pictures import CalibrationImages
from tap_deploy.engines.calibration.prompts import CalibrationPrompts
from tap_deploy.engines.verdict import regions as evaluation_data
from tap_deploy.engines.verdict.regions import cases_from_images, propose, split_images, without
from tap_deploy.errors import InputError
from tap_deploy.masks import mask_ious


def images(count: int) -> CalibrationImages:
    digests = tuple(hashlib.sha256(str(i).encode()).hexdigest() for i in range(count))
    return CalibrationImages(paths=tuple(map(pathlib.Path, digests)), digests=digests)


def test_about_a_fifth_is_held_back_and_nothing_is_on_both_sides():
    every = images(500)
    calibration, evaluation = split_images(every)
    assert 70 < len(evaluation) < 130
    assert set(calibration.digests) | set(evaluation.digests) == set(every.digests)
    assert not set(calibration.digests) & set(evaluation.digests)


def test_a_picture_stays_on_its_side():
    few, _ = split_images(images(100))
    many, _ = split_images(images(300))
    assert set(few.digests) <= set(many.digests)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_there_is_one_on_either_side(count, monkeypatch):
    calibration, evaluation = split_images(images(count))
    assert len(calibration) >= 1 and len(evaluation) >= 1
    # Even if the digests would have all of them on one side.
    for share in (1e-9, 1 - 1e-9):
        monkeypatch.setattr(evaluation_data, "HELD_OUT_SHARE", share)
        calibration, evaluation = split_images(images(count))
        assert len(calibration) >= 1 and len(evaluation) >= 1


def test_one_picture_cannot_be_parted():
    with pytest.raises(InputError, match="--evaluation-data"):
        split_images(images(1))


def test_what_was_calibrated_on_does_not_judge():
    every = images(4)
    assert without(every, {every.digests[1]}).digests == (
        every.digests[0],
        *every.digests[2:],
    )
    with pytest.raises(InputError, match="are calibration pictures"):
        without(every, set(every.digests))


def test_proposals_are_distinct_regions(predictor, photo):
    prompts = propose(predictor, photo, 5)
    assert 1 <= len(prompts) <= 5
    rgb = np.asarray(Image.open(photo).convert("RGB"))
    prompts.check(rgb.shape[1], rgb.shape[0])
    assert prompts.labels[0, 0] == 2  # a box, then a point, in turns
    if len(prompts) > 1:
        assert prompts.labels[1, 0] == 1
    points = predictor.predict(rgb, prompts=prompts[1:2], captions=False)
    assert 0.002 <= points.masks.mean() <= 0.7 or len(prompts) == 1


def test_the_same_mask_is_proposed_once(predictor):
    from tap_deploy.engines.verdict.regions import _distinct

    masks = np.zeros((4, 20, 20), bool)
    masks[0, :10, :10] = masks[1, :10, :9] = True  # all but the same
    masks[2, 12:, 12:] = True
    masks[3] = True  # the whole picture
    assert _distinct(masks, np.array([3, 1, 0, 2]), 4) == [1, 2]
    assert mask_ious(masks[:1], masks[1:2])[0] == pytest.approx(0.9)


def test_own_prompts_take_the_place_of_proposals(predictor, photo, tmp_path):
    prompts = CalibrationPrompts(
        own={photo.name: {"boxes": [[10, 10, 90, 90]], "points": [[[50, 50, 1]], [[80, 60, 1]]]}}
    )
    Image.open(photo).convert("L").save(tmp_path / "grey.png")
    paths = (photo, tmp_path / "grey.png")
    found = list(
        cases_from_images(
            predictor,
            CalibrationImages(paths=paths, digests=("a", "b")),
            prompts=prompts,
        )
    )
    assert [len(case.prompts) for case in found[:2]] == [1, 2]  # kinds are not mixed
    assert found[0].image == photo
    # What has to be converted is kept as the picture that it became.
    assert isinstance(found[2].image, np.ndarray) and found[2].image.shape[2] == 3
