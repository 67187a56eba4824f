"""predict_many gives the results of predict in order, and prepares the next pictures ahead."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from PIL import Image

from tap_deploy import PictureFile, Prompts, TapPredictor, graphs
from tap_deploy.errors import InputError, SessionError
from tap_deploy.prediction.read_ahead import ReadAhead
from tap_deploy.sessions.fake import FakeSession

POINTS = [[[9, 9, 1]], [[30, 20, 1]]]


@pytest.fixture
def pictures(golden, tmp_path):
    """Golden pictures, cut to several sizes; as arrays, PIL images and files."""
    whole = np.ascontiguousarray(golden["image_bgr_0"][..., ::-1])
    arrays = [np.ascontiguousarray(whole[: 60 + 9 * i, : 99 - 7 * i]) for i in range(6)]
    Image.fromarray(arrays[1]).save(tmp_path / "one.png")
    return [arrays[0], tmp_path / "one.png", Image.fromarray(arrays[2]), *arrays[3:]]


@pytest.fixture
def batching_predictor(micro_bundle):
    """Encodes four pictures at once."""
    with TapPredictor.from_bundle(micro_bundle.path) as predictor:
        predictor._pipeline.max_images = 4
        yield predictor


@pytest.fixture
def fake_predictor(micro_config):
    sessions = {name: FakeSession(spec) for name, spec in graphs.graph_specs(micro_config).items()}
    return TapPredictor(sessions, micro_config), sessions


def assert_same(found, expected, tolerance=0.0):
    np.testing.assert_allclose(found.low_res_masks, expected.low_res_masks, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(found.caption_ids, expected.caption_ids)
    np.testing.assert_array_equal(found.masks, expected.masks)
    assert found.captions == expected.captions
    assert found.image_width == expected.image_width


@pytest.mark.parametrize("read_ahead", [1, 2, 9])
def test_the_answers_are_those_of_predict(predictor, pictures, read_ahead):
    expected = [predictor.predict(picture, POINTS) for picture in pictures]
    found = list(predictor.predict_many(iter(pictures), POINTS, read_ahead=read_ahead))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_batches_give_the_answers_of_predict(batching_predictor, pictures):
    pictures[2] = batching_predictor.encode(pictures[2])
    expected = [batching_predictor.predict(picture, POINTS) for picture in pictures]
    for one, other in zip(batching_predictor.predict_many(pictures, POINTS), expected, strict=True):
        assert_same(one, other, 1e-4)


def test_batches_are_as_large_as_the_pipeline_takes(fake_predictor):
    predictor, sessions = fake_predictor
    predictor._pipeline.max_images = 4
    images = [np.zeros((40, 60, 3), np.uint8)] * 6
    assert len(list(predictor.predict_many(images, POINTS, captions=False))) == 6
    shapes = [call["images"][0] for call in sessions[graphs.IMAGE_ENCODER].calls]
    assert shapes == [4, 2]


def test_pairs_bring_their_own_prompts(predictor, pictures):
    prompts = [Prompts.from_boxes([[1, 2, 30 + i, 40]] * i) for i in range(len(pictures))]
    pairs = zip(pictures, prompts, strict=True)
    for index, regions in enumerate(predictor.predict_many(pairs, masks="rle", captions=False)):
        assert len(regions) == len(regions.rles) == index
        assert regions.prompts is prompts[index]


def test_seeds_begin_anew_with_each_picture(predictor, pictures):
    options = {"temperature": 1.0, "seed": 3}
    for picture, regions in zip(
        pictures, predictor.predict_many(pictures, POINTS, **options), strict=True
    ):
        assert_same(regions, predictor.predict(picture, POINTS, **options))


def test_no_pictures_give_no_regions(fake_predictor):
    assert list(fake_predictor[0].predict_many([], POINTS)) == []


def test_arguments_are_checked_before_the_first_picture(fake_predictor):
    predictor, _ = fake_predictor
    taken = iter(["nowhere.jpg"])
    for options, message in [
        ({"top_k": 0}, "top_k is 0"),
        ({"read_ahead": 0}, "read_ahead is 0"),
        ({"masks": "png"}, "masks is 'png'"),
        ({"boxes": [[1, 2, 3]]}, "box"),
    ]:
        with pytest.raises(InputError, match=message):
            predictor.predict_many(taken, **options)
    assert next(taken) == "nowhere.jpg"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("nowhere.jpg", r"^picture 2 \('nowhere.jpg'\): .* does not exist"),
        (np.zeros((5, 5, 3), np.uint8), "^picture 2: region 0, point 0 .* outside the picture"),
        ((np.zeros((40, 60, 3), np.uint8), Prompts.from_points(POINTS)), "pass only one of them"),
        (("x.jpg", [[1, 2, 3, 4]]), r"^picture 2 \('x.jpg'\): item is a tuple; expected"),
        ((), "^picture 2: item is a tuple"),
        (None, "^picture 2: image is of type NoneType"),
    ],
)
@pytest.mark.parametrize("group", [1, 4])
def test_errors_come_in_their_turn(fake_predictor, item, message, group):
    predictor, _ = fake_predictor
    predictor._pipeline.max_images = group
    good = np.zeros((40, 60, 3), np.uint8)
    results = predictor.predict_many([good, good, item, good], POINTS, captions=False)
    assert [len(next(results)) for _ in range(2)] == [2, 2]
    with pytest.raises(InputError, match=message):
        next(results)
    assert list(results) == []


def test_items_without_prompts_say_so(fake_predictor):
    results = fake_predictor[0].predict_many([np.zeros((40, 60, 3), np.uint8)])
    with pytest.raises(InputError, match="picture 0: no prompt"):
        next(results)


def test_errors_of_a_backend_come_in_their_turn(fake_predictor):
    predictor, _ = fake_predictor
    predictor.close()
    with pytest.raises(SessionError, match="picture 0: this predictor is closed"):
        next(predictor.predict_many([np.zeros((40, 60, 3), np.uint8)], POINTS))


def threads():
    return {thread for thread in threading.enumerate() if thread.is_alive()}


@pytest.mark.parametrize("group", [1, 3])
def test_stopping_early_leaves_nothing_behind(fake_predictor, group):
    predictor, sessions = fake_predictor
    predictor._pipeline.max_images = group
    before, taken = threads(), []

    def endless():
        while True:
            taken.append(1)
            yield np.zeros((40, 60, 3), np.uint8)

    results = predictor.predict_many(endless(), POINTS, captions=False, read_ahead=2)
    assert not taken
    for _ in range(4):
        next(results)
    results.close()
    assert threads() == before
    assert len(taken) <= 4 + max(2, group) + group
    done = len(sessions[graphs.PROMPT_DECODER].calls)
    time.sleep(0.02)
    assert len(sessions[graphs.PROMPT_DECODER].calls) == done


def test_an_error_of_the_iterable_ends_it_and_its_threads(fake_predictor):
    before = threads()

    def broken():
        yield np.zeros((40, 60, 3), np.uint8)
        raise OSError("the camera is gone")

    with pytest.raises(OSError, match="the camera is gone"):
        list(fake_predictor[0].predict_many(broken(), POINTS, captions=False))
    assert threads() == before


@pytest.mark.parametrize("read_ahead", [1, 3])
def test_steps_of_different_items_run_side_by_side(read_ahead):
    """Item n is finished only after item n + read_ahead began: a deadlock if it was not read."""
    begun = [threading.Event() for _ in range(9)]

    def prepare(item):
        begun[item].set()
        return item

    def finish(item):
        assert begun[min(item + read_ahead, 8)].wait(30)
        return item

    ahead = ReadAhead(prepare, list, finish, group_size=1, read_ahead=read_ahead)
    assert [future.result(60) for _, future in ahead.run(range(9))] == list(range(9))


def test_pictures_that_cannot_be_used_are_left_out(predictor, pictures, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    items = [
        (pictures[0], Prompts.from_points(POINTS)),
        (tmp_path / "broken.png", Prompts.from_points(POINTS)),
        (pictures[2], Prompts.from_points([[[5000, 5, 1]]])),
        (pictures[3], Prompts.from_points(POINTS)),
    ]
    problems = []
    found = predictor.predict_many(items, on_error=lambda *problem: problems.append(problem))
    assert_same(next(found), predictor.predict(pictures[0], POINTS))
    assert_same(next(found), predictor.predict(pictures[3], POINTS))
    assert next(found, None) is None
    assert [number for number, _ in problems] == [1, 2]
    assert "broken.png" in str(problems[0][1])
    assert "lies outside the picture" in str(problems[1][1])


def test_a_backend_that_fails_is_no_picture_to_leave_out(fake_predictor, pictures):
    predictor, sessions = fake_predictor

    def fail(inputs, outputs):
        raise SessionError("the backend failed")

    sessions[graphs.IMAGE_ENCODER]._run = fail
    with pytest.raises(SessionError, match="picture 0: the backend failed"):
        list(predictor.predict_many(pictures, POINTS, on_error=lambda *problem: None))


def test_regions_say_whose_they_are(predictor, pictures, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    images = [tmp_path / "broken.png", tmp_path / "one.png", pictures[0]]
    found = list(predictor.predict_many(images, POINTS, on_error=lambda *problem: None))
    assert [regions.image_path for regions in found] == [str(tmp_path / "one.png"), None]
    encoded = predictor.encode(PictureFile(source=tmp_path / "one.png"))
    assert predictor.predict(encoded, POINTS).image_path == str(tmp_path / "one.png")


def test_one_picture_is_not_many(predictor, pictures, tmp_path):
    data = (tmp_path / "one.png").read_bytes()
    with open(tmp_path / "one.png", "rb") as file:
        for one in (
            *(str(tmp_path / "one.png"), tmp_path / "one.png", data, file, pictures[0]),
            *(pictures[2], PictureFile(source=data), predictor.encode(pictures[0]), None, 3),
        ):
            with pytest.raises(InputError, match="expected an iterable of pictures; for one"):
                predictor.predict_many(one, POINTS)
    batch = np.stack([pictures[0], pictures[0]])
    assert len(list(predictor.predict_many(batch, POINTS, captions=False))) == 2
