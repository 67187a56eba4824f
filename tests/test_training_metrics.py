"""Metrics and the evaluation, on cases computed by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

pytest.importorskip("torch")

from training_standin import NAMES, Oracle, StandInScenes, shape_mask

from tap_deploy.errors import InputError
from tap_deploy.evaluation.clicks import inner_point
from tap_deploy.evaluation.words import words
from tap_deploy.masks import mask_iou
from tap_deploy.training.scenes.clicks import inner_stroke
from tap_deploy.training.scores.cider import cider_d
from tap_deploy.training.scores.evaluation import Scores, comparison, evaluate
from tap_deploy.training.scores.metrics import first_name


def test_mask_iou_by_hand():
    a, b, nothing = np.zeros((3, 4, 4), bool)
    a[0, :3] = b[0, 1:] = True
    assert mask_iou(a, b) == 2 / 4
    assert mask_iou(a, a) == mask_iou(nothing, nothing) == 1
    assert mask_iou(a, nothing) == 0


def test_the_inner_point_of_a_square_is_its_centre():
    assert inner_point(shape_mask("square", 20, 41, 7)) == (20, 41)


def test_the_inner_point_lies_in_the_thick_part():
    mask = shape_mask("disc", 40, 40, 10)
    mask[39:42, :40] = True  # a long handle, over to the border
    assert inner_point(mask) == (40, 40)


def test_the_inner_point_of_a_ring_is_not_in_its_hole():
    mask = shape_mask("disc", 30, 30, 20) & ~shape_mask("disc", 30, 30, 14)
    x, y = inner_point(mask)
    assert mask[int(y), int(x)]


def test_a_stroke_follows_the_long_side_and_stays_inside():
    mask = np.zeros((60, 80), np.bool_)
    mask[20:30, 5:75] = True
    stroke = inner_stroke(mask)
    xs, ys = np.array(stroke).T
    assert len(stroke) == 8 and np.ptp(ys) <= 1 and np.ptp(xs) > 50
    turned = np.array(inner_stroke(np.ascontiguousarray(mask.T)))
    assert np.ptp(turned[:, 0]) <= 1 and np.ptp(turned[:, 1]) > 50


@pytest.mark.parametrize("name", ["ring", "disc", "dot"])
def test_every_point_of_a_stroke_lies_in_the_mask(name):
    ys, xs = np.mgrid[:50, :50]
    distance = np.hypot(ys - 25, xs - 22)
    masks = {"ring": (distance < 20) & (distance > 12), "disc": distance < 9, "dot": distance < 1}
    for x, y in inner_stroke(masks[name]):
        assert masks[name][int(y), int(x)]


def test_the_border_of_the_picture_counts_as_an_edge():
    mask = np.zeros((9, 9), bool)
    mask[:, :5] = True
    assert inner_point(mask) == (2, 4)


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("a red apple left of a guitar", "apple"),
        ("a guitar below an apple", "guitar"),
        ("a large hot dog at the top", "hot dog"),
        ("a dog on the left", "dog"),
        ("an underdog on the left", None),
        ("A Hot Dog", "hot dog"),
        ("", None),
    ],
)
def test_the_first_name_in_a_caption(caption, name):
    assert first_name(caption, ("dog", "hot", "hot dog", "apple", "guitar")) == name


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A small, red apple.", ["a", "small", "red", "apple"]),
        ("a t-shirt; the dog's bone", ["a", "t-shirt", "the", "dog", "'s", "bone"]),
        ("it isn't 2 pm!", ["it", "is", "n't", "2", "pm"]),
        ("", []),
    ],
)
def test_words_as_ptb_splits_them(caption, expected):
    assert words(caption) == expected


def test_cider_of_two_captions_by_hand():
    """All n-grams of "a cat" are in one of two references but "a", which is in both: rarity 0.

    n = 1: candidate and truth are log 2 on "cat" only, cosine 1; n = 2: "a cat" alike.
    n = 3 and 4: no n-grams, 0. Mean 1 / 2, times 10.
    """
    assert cider_d(["a cat", "x y"], [["a cat"], ["a dog"]]) == pytest.approx([5, 0])


def test_cider_clips_counts_and_punishes_length_by_hand():
    """Candidate "cat cat dog", truth "cat dog"; everything occurs in one of two references.

    n = 1: (2, 1) against (1, 1), clipped to (1, 1): dot 2, norms sqrt(5) * sqrt(2).
    n = 2: {cat cat, cat dog} against {cat dog}: dot 1, norms sqrt(2) * 1.
    n = 3 and 4: the truth has none. Length differs by 1.
    """
    cosines = 2 / math.sqrt(10) + 1 / math.sqrt(2)
    expected = 10 * math.exp(-1 / 72) * cosines / 4
    assert cider_d(["cat cat dog", ""], [["cat dog"], ["bird"]])[0] == pytest.approx(expected)


def test_cider_averages_over_references_and_counts_rarity_by_region():
    """ "cat" is in the references of one of three regions, twice: log 3 all the same."""
    references = [["cat", "cat cat"], ["dog"], ["bird"]]
    first = 10 * (1 / 4)
    second = 10 * math.exp(-1 / 72) * (1 * 2 / 2 / 4)  # n = 1 clipped: 1 * 2 over norms 1 * 2
    score = cider_d(["cat", "dog", "x"], references)
    assert score == pytest.approx([(first + second) / 2, 2.5, 0])


def test_cider_of_identical_captions_is_10():
    texts = [f"a {color} apple at the {place}" for color in ("red", "green") for place in "xyz"]
    assert cider_d(texts, [[text] for text in texts]) == pytest.approx([10] * 6)
    assert cider_d([], []) == []


def test_cider_needs_a_reference_for_everything():
    with pytest.raises(InputError, match="2 captions and 1 lists"):
        cider_d(["a", "b"], [["a"]])
    with pytest.raises(InputError, match="one non-empty list per caption"):
        cider_d(["a"], [[]])


def test_a_subject_that_knows_everything_gets_full_marks():
    source = StandInScenes()
    oracle = Oracle(source, lambda _, item: (item.mask, [item.name], item.caption))
    done = []
    scores = evaluate(oracle, source, 11, lambda: done.append(1))
    assert scores.regions == len(done) == 11
    for kind in (scores.box, scores.point):
        values = dataclasses.asdict(kind)
        assert values.pop("cider") == pytest.approx(1000)
        assert set(values.values()) == {1.0}


def test_boxes_and_points_are_scored_apart_and_every_measure_on_its_own():
    source = StandInScenes()
    wrong = [name for name in NAMES]

    def spoil(index, item):
        if index < 2:  # boxes: names beyond the first, a caption with another place
            others = [name for name in wrong if name != item.name][:2]
            return item.mask, [*others, item.name], f"a {item.name} somewhere"
        half = item.mask.copy()
        half[: int(item.box[1] + item.box[3]) // 2] = False
        return half, [item.name], "a thing"

    scores = evaluate(Oracle(source, spoil), source, 8)
    assert (scores.box.mask_iou, scores.box.concept_top1, scores.box.concept_top5) == (1, 0, 1)
    assert (scores.box.caption_named, scores.box.caption_exact) == (1, 0)
    assert 0.4 < scores.point.mask_iou < 0.6
    assert scores.point.concept_top1 == 1
    assert scores.point.caption_named == scores.point.caption_exact == 0
    assert scores.box.cider > 100 > scores.point.cider


def test_the_prompts_are_the_true_box_and_a_point_in_the_object():
    source, seen = StandInScenes(), []

    class Recorder(Oracle):
        def predict(self, image, *, prompts, top_k):
            seen.append(prompts)
            return super().predict(image, prompts=prompts, top_k=top_k)

    evaluate(Recorder(source, lambda _, item: (item.mask, [item.name], "")), source, 2)
    (prompts,) = seen
    objects = source.scene(0).objects
    assert prompts.labels.tolist() == [[2, 3]] * 2 + [[1, 4]] * 2
    for item, box, point in zip(objects, prompts.coords[:2], prompts.coords[2:], strict=True):
        assert box.flatten().tolist() == item.box.tolist()
        x, y = point[0].astype(int)
        assert item.mask[y, x]


def test_a_subject_without_captions_is_refused():
    class Mute(Oracle):
        def predict(self, image, **asked):
            return dataclasses.replace(super().predict(image, **asked), captions=None)

    source = StandInScenes()
    mute = Mute(source, lambda _, item: (item.mask, [item.name], ""))
    with pytest.raises(InputError, match=r"no masks, names or captions; .* --tokenizer"):
        evaluate(mute, source, 2)
    with pytest.raises(InputError, match="num_regions is 0"):
        evaluate(mute, source, 0)


def test_the_comparison_has_a_column_a_subject():
    source = StandInScenes()
    oracle = Oracle(source, lambda _, item: (item.mask, [item.name], item.caption))
    scores: Scores = evaluate(oracle, source, 3)
    lines = comparison({"PyTorch": scores, "onnxruntime fp32": scores}).splitlines()
    assert lines[0].split() == ["prompt", "PyTorch", "onnxruntime", "fp32"]
    assert lines[1].split() == ["mask_iou", "box", "1.000", "1.000"]
    assert len(lines) == 1 + 6 * 2 + 1
    assert "3 regions" in lines[-1]
