"""Captions of regions that were predicted without, of several pictures at once, as they grow."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tap_deploy import TapPredictor, graphs
from tap_deploy.errors import InputError
from tap_deploy.sessions.fake import FakeSession
from tests.made_regions import made_up


def pictures_of(golden):
    return [np.ascontiguousarray(golden[f"image_bgr_{index}"][..., ::-1]) for index in (0, 1)]


def uncaptioned(predictor, golden):
    """Regions of two pictures, one and three."""
    points = golden["points_px"]
    return [
        predictor.predict(picture, points=rows, captions=False)
        for picture, rows in zip(pictures_of(golden), (points[:1], points[4:7]), strict=True)
    ]


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 3}, {"max_new_tokens": 0}])
def test_captions_are_those_of_predict(predictor, golden, options):
    before = uncaptioned(predictor, golden)
    points = golden["points_px"]
    after = predictor.caption_many(before, **options)
    for picture, rows, one, old in zip(
        pictures_of(golden), (points[:1], points[4:7]), after, before, strict=True
    ):
        expected = predictor.predict(picture, points=rows, **options)
        assert one.captions == expected.captions
        np.testing.assert_array_equal(one.caption_ids, expected.caption_ids)
        assert one.masks is old.masks and old.captions is None


def test_draws_are_those_of_predict(predictor, golden):
    [picture, _] = pictures_of(golden)
    points = golden["points_px"][:3]
    drawn = {"temperature": 2.0, "seed": 5}
    expected = predictor.predict(picture, points=points, **drawn)
    before = predictor.predict(picture, points=points, captions=False)
    [after] = predictor.caption_many([before], **drawn)
    assert after.captions == expected.captions


@pytest.mark.parametrize("per_call", [1, 3, 100])
def test_texts_grow_by_a_token_at_a_time(predictor, golden, monkeypatch, per_call):
    monkeypatch.setattr("tap_deploy.prediction.answers.captions_per_call", lambda *sizes: per_call)
    found = []
    before = uncaptioned(predictor, golden)
    after = predictor.caption_many(before, max_new_tokens=5, on_captions=found.append)
    assert len(found) == 5 * {1: 4, 3: 2, 100: 1}[per_call]
    assert found[-1] == [caption for one in after for caption in one.captions]
    lengths = [[len(text) for text in texts] for texts in found]
    assert all(np.less_equal(*pair).all() for pair in itertools.pairwise(lengths))
    assert lengths[0] != lengths[-1] and found[0][3] == ("" if per_call < 100 else found[0][3])


def test_nothing_to_write(predictor):
    assert predictor.caption_many([]) == []
    [empty] = predictor.caption_many([predictor.predict(np.zeros((9, 9, 3), np.uint8), points=[])])
    assert empty.captions == []


def test_without_a_tokenizer_there_are_ids_only(micro_config):
    sessions = {name: FakeSession(spec) for name, spec in graphs.graph_specs(micro_config).items()}
    predictor = TapPredictor(sessions, micro_config)
    regions = predictor.predict(np.zeros((40, 60, 3), np.uint8), points=[[[9, 9, 1]]])
    [after] = predictor.caption_many([regions], max_new_tokens=2, on_captions=pytest.fail)
    assert after.captions is None and after.caption_ids.shape == (1, 39)


def test_bad_arguments(predictor, golden):
    [regions, _] = uncaptioned(predictor, golden)
    with pytest.raises(InputError, match=r"expected a list of Regions; pass \[regions\]"):
        predictor.caption_many(regions)
    with pytest.raises(InputError, match="expected a list of Regions"):
        predictor.caption_many(["regions.json"])
    with pytest.raises(InputError, match="semantic tokens of 8 channels; expected"):
        predictor.caption_many([made_up()])
    with pytest.raises(InputError, match="temperature is -1"):
        predictor.caption_many([regions], temperature=-1)
