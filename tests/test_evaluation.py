"""The protocols on small made data sets: by hand, and by the libraries on files."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("pycocotools")
pytest.importorskip("pycocoevalcap")
pytest.importorskip("torch")

from made_data_sets import MadeData
from training_standin import NAMES, StandInScenes

from tap_deploy.concepts import Vocabulary
from tap_deploy.config import PointLabel
from tap_deploy.errors import InputError
from tap_deploy.evaluation.average_precision import (
    COCO_METRICS,
    LVIS_METRICS,
    Metric,
    coco_scores,
    lvis_modules,
    lvis_scores,
)
from tap_deploy.evaluation.boxes import prompts_from_boxes
from tap_deploy.evaluation.caption_scores import caption_scores, tokenized
from tap_deploy.evaluation.captioning import Captioning
from tap_deploy.evaluation.classification import Classification, categories_of, detections
from tap_deploy.evaluation.clicks import first_click, next_click
from tap_deploy.evaluation.instances import COCO, LVIS, Instances
from tap_deploy.evaluation.segmentation import Segmentation
from tap_deploy.evaluation.words import words
from tap_deploy.formats.coco import compressed_rles
from tap_deploy.image import Frame, load_image
from tap_deploy.masks import rle_from_mask
from tap_deploy.regions import Regions
from tap_deploy.training.scores.cider import cider_d

PICTURES = 6
needs_java = pytest.mark.skipif(
    shutil.which("java") is None, reason="needs apt-get install default-jre-headless"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return MadeData(tmp_path_factory.mktemp("data"), StandInScenes(), PICTURES, NAMES)


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setattr("tap_deploy.evaluation.caption_scores.shutil.which", lambda name: None)


@dataclasses.dataclass
class Seen:
    frame: Frame
    scene: object


class Knowing:
    """A subject that knows the scenes, and answers each prompt as ``say`` has it."""

    def __init__(self, data, say):
        self._by_image = {scene.image.tobytes(): scene for scene in data.scenes}
        self._say, self.prompts = say, []

    def encode(self, image):
        pixels = load_image(image)
        return Seen(Frame.for_image(*pixels.shape[:2], 64), self._by_image[pixels.tobytes()])

    def predict(self, image, *, prompts, masks, captions):
        self.prompts.append(prompts)
        answers = [
            self._say(nearest(image.scene, row), row, labels)
            for row, labels in zip(prompts.coords, prompts.labels, strict=True)
        ]
        zeros = np.zeros((len(prompts), 1), np.float32)
        return Regions(
            masks=None,
            rles=[rle_from_mask(answer["mask"]) for answer in answers] if masks else None,
            iou_predictions=np.array([answer.get("iou", 1) for answer in answers], np.float32),
            mask_index=np.zeros(len(prompts), np.int64),
            concepts=None,
            captions=[answer["caption"] for answer in answers] if captions else None,
            caption_ids=None,
            semantic_tokens=zeros,
            semantic_embeddings=np.array([answer["embedding"] for answer in answers], np.float32),
            low_res_masks=None,
            prompts=prompts,
            image_height=image.frame.height,
            image_width=image.frame.width,
        )


def nearest(scene, row):
    """The object of a scene whose centre is nearest to that of a prompt."""
    centre = row[0] if len(row) > 1 and not row[1].any() else row[:2].mean(axis=0)
    return min(
        scene.objects, key=lambda item: np.hypot(*(item.box.reshape(2, 2).mean(axis=0) - centre))
    )


def embedding(name):
    return np.eye(len(NAMES), dtype=np.float32)[NAMES.index(name)]


def right(item, row, labels):
    return {"mask": item.mask, "caption": item.caption, "embedding": embedding(item.name)}


def answers_of(protocol, subject):
    """The answers as they come back from a file."""
    found = {picture.id: protocol.answer(subject, picture) for picture in protocol.pictures}
    return json.loads(json.dumps(found), object_hook=_whole_keys)


def _whole_keys(found):
    return {int(key) if key.isdigit() and len(key) > 3 else key: found[key] for key in found}


def score(protocol, subject):
    return protocol.score(answers_of(protocol, subject))


# Segmentation


def perfect_boxes(data, folder):
    """Detections with the true classes and scores of 1."""
    content = json.loads(data.lvis.read_text())
    found = [
        {key: entry[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1.0}
        for entry in content["annotations"]
    ]
    path = folder / "perfect.json"
    path.write_text(json.dumps(found))
    return path


def test_right_masks_get_full_marks_on_coco_and_lvis(data, tmp_path):
    detections = perfect_boxes(data, tmp_path)
    lvis = Segmentation.read(LVIS, data.lvis, data.images, detections)
    subject = Knowing(data, right)
    scores = score(lvis, subject)
    assert list(scores) == [*LVIS_METRICS, "mIoU 1pt", "mIoU 3pt"]
    assert {name: value for name, value in scores.items() if value is not None} == pytest.approx(
        {name: 100 for name in scores if scores[name] is not None}
    )
    assert lvis.num_regions == 2 * 2 * PICTURES
    first = subject.prompts[0]
    assert first.labels.tolist() == [[2, 3]] * 2  # the boxes of a picture, then clicks
    assert [p.labels.shape[1] for p in subject.prompts[1:4]] == [2, 2, 2]


def cut(mask, share):
    """The first rows of a mask, about a share of them."""
    rows = np.flatnonzero(mask.any(axis=1))
    short = mask.copy()
    short[rows[0] + round(share * len(rows)) :] = False
    return short


def one_picture(boxes, **extra):
    """COCO annotations of boxes of class 1 in a picture of 100 x 100 pixels."""
    return Instances(
        pictures=(),
        images=[{"id": 5, "height": 100, "width": 100, **extra}],
        categories=[
            {"id": 1, "name": "a", "frequency": "r"},
            {"id": 2, "name": "b", "frequency": "f"},
        ],
        annotations=[
            {"id": i + 1, "image_id": 5, "category_id": 1, "bbox": box, "iscrowd": 0}
            | {"area": box[2] * box[3], "segmentation": mask_of(box)}
            for i, box in enumerate(boxes)
        ],
        sha256="",
        image_ids=frozenset({5}),
    )


def mask_of(box):
    mask = np.zeros((100, 100), bool)
    x, y, width, height = box
    mask[y : y + height, x : x + width] = True
    return compressed_rles([rle_from_mask(mask)])[0]


def box_result(box, score, category=1):
    return {"image_id": 5, "category_id": category, "bbox": box, "score": score}


def mask_results(results):
    return [
        {key: value for key, value in result.items() if key != "bbox"}
        | {"segmentation": mask_of(result["bbox"])}
        for result in results
    ]


BOX, ELSEWHERE = [10, 10, 40, 40], [60, 60, 30, 30]


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([box_result(BOX, 0.9)], 100),
        ([box_result(BOX, 0.9), box_result(ELSEWHERE, 0.5)], 100),  # a false one comes later
        ([box_result(BOX, 0.5), box_result(ELSEWHERE, 0.9)], 50),  # it comes first
        ([box_result([10, 10, 40, 29], 0.9)], 50),  # IoU 0.725: 5 of 10 thresholds
        ([box_result(ELSEWHERE, 0.9)], 0),
        ([], 0),
    ],
)
def test_average_precision_by_hand(results, expected):
    lists = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    instances = one_picture([BOX], **lists)
    for metric in (coco_scores, lvis_scores):
        copied = [dict(result) for result in results]
        assert metric(instances, copied, Metric.BOX)["AP"] == pytest.approx(expected)
        masks = mask_results(results)
        assert metric(instances, masks, Metric.SEGM)["AP"] == pytest.approx(expected)


def test_lvis_counts_only_classes_that_were_looked_for():
    """Class 2 is not in the picture: a detection of it counts only if the picture says so."""
    false = [box_result(BOX, 0.5), box_result(ELSEWHERE, 0.9)]
    other = [box_result(BOX, 0.5), box_result(ELSEWHERE, 0.9, category=2)]
    lists = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    by_hand = one_picture([BOX], **lists)
    assert lvis_scores(by_hand, other, Metric.BOX)["APr"] == pytest.approx(100)
    assert lvis_scores(by_hand, other, Metric.BOX)["APf"] is None  # no object of class 2
    incomplete = one_picture(
        [BOX], **lists | {"not_exhaustive_category_ids": [1]}
    )  # the false one may be an object that nobody marked
    assert lvis_scores(incomplete, false, Metric.BOX)["APr"] == pytest.approx(100)
    assert lvis_scores(by_hand, false, Metric.BOX)["APr"] == pytest.approx(50)


def spoiled(item, row, labels):
    """Masks of mixed quality, by class and place."""
    share = 0.5 + 0.1 * (NAMES.index(item.name) % 5) + 0.05 * (float(row[0, 0]) % 2)
    return right(item, row, labels) | {"mask": cut(item.mask, share)}


def results_of(protocol, subject):
    return protocol._results(answers_of(protocol, subject))


def test_coco_metrics_equal_the_library_on_files(data, tmp_path):
    from pycocotools.coco import COCO as Library
    from pycocotools.cocoeval import COCOeval

    protocol = Segmentation.read(COCO, data.coco, data.images, data.detections)
    subject = Knowing(data, spoiled)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results_of(protocol, subject)))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = Library(str(data.coco))
        judge = COCOeval(truth, truth.loadRes(str(path)), "segm")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    scores = score(protocol, subject)
    assert 0 < scores["AP"] < 100 and scores["AP"] < scores["AP50"]
    for name, value in zip(COCO_METRICS, judge.stats, strict=False):
        assert scores[name] == (None if value == -1 else pytest.approx(100 * value)), name


def test_lvis_metrics_equal_the_library_on_files(data, tmp_path):
    protocol = Segmentation.read(LVIS, data.lvis, data.images, data.detections)
    subject = Knowing(data, spoiled)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results_of(protocol, subject)))
    judge = lvis_modules().eval.LVISEval(str(data.lvis), str(path), "segm")
    judge.run()
    scores = score(protocol, subject)
    assert 0 < scores["AP"] < 100
    for name in LVIS_METRICS:
        value = judge.results[name]
        assert scores[name] == (None if value == -1 else pytest.approx(100 * value)), name


def test_lvis_is_loaded_without_what_draws():
    code = (
        "import logging, sys\n"
        "from tap_deploy.evaluation.average_precision import lvis_modules\n"
        "lvis_modules()\n"
        "print(*{'cv2', 'matplotlib', 'lvis'} & set(sys.modules), logging.root.handlers)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["[]"]


def test_without_detections_only_points_are_measured(data):
    protocol = Segmentation.read(COCO, data.coco, data.images)
    scores = score(protocol, Knowing(data, right))
    assert list(scores) == ["mIoU 1pt", "mIoU 3pt"]
    crowds = sum(entry["iscrowd"] for entry in json.loads(data.coco.read_text())["annotations"])
    assert crowds and protocol.num_regions == 2 * PICTURES - crowds


def test_points_go_where_the_mask_is_wrong():
    truth = np.zeros((20, 30), bool)
    truth[5:14, 4:13] = True
    assert first_click(truth) == (8, 9, PointLabel.FOREGROUND)
    assert next_click(truth, truth) is None
    half = truth.copy()
    half[:, 8:] = False  # columns 8 to 12 of rows 5 to 13 are missing
    assert next_click(half, truth) == (10, 9, PointLabel.FOREGROUND)
    more = truth.copy()
    more[5:14, 13:24] = True  # 11 columns too many
    assert next_click(more, truth) == (18, 9, PointLabel.BACKGROUND)


def test_iou_is_taken_after_1_and_3_points(data):
    """Half a mask for 1 point, three quarters for 2, all for 3; right answers get no new point."""

    def say(item, row, labels):
        points = int((labels <= PointLabel.FOREGROUND).sum())
        first_half = right(item, row, labels) | {"mask": cut(item.mask, 0.25 + 0.25 * points)}
        return first_half if points < 3 else right(item, row, labels)

    protocol = Segmentation.read(COCO, data.coco, data.images)
    subject = Knowing(data, say)
    truths = [item for scene in data.scenes for item in scene.objects]
    answers = answers_of(protocol, subject)
    shapes = [prompts.labels.shape[1] for prompts in subject.prompts[:3]]
    assert shapes == [2, 3, 4]  # 1, 2 and 3 points, and one of padding
    ones = [iou for answer in answers.values() for iou in answer["ious"]["1"]]
    assert len(ones) < len(truths) and 0.3 < np.mean(ones) < 0.7
    # Boxes drawn as polygons are larger than the discs in them.
    threes = [iou for answer in answers.values() for iou in answer["ious"]["3"]]
    assert max(threes) == 1 and np.mean(threes) > 0.9
    scores = protocol.score(answers)
    assert scores["mIoU 1pt"] == pytest.approx(100 * np.mean(ones))
    assert scores["mIoU 3pt"] == pytest.approx(100 * np.mean(threes))


def test_boxes_are_moved_into_the_picture_and_never_empty():
    frame = Frame.for_image(50, 80, 64)
    boxes = [
        [-0.01, 3, 20, 47.02],
        [79.99, 10, 5, 5],
        [10, 10, 0, 4],
        [100, 60, 5, 5],
        [1, 2, 3, 4],
    ]
    prompts = prompts_from_boxes(boxes, frame)
    prompts.check(frame.width, frame.height)
    assert prompts.coords[0].tolist() == [[0, 3], [pytest.approx(19.99), 50]]
    assert prompts.coords[4].tolist() == [[1, 2], [4, 6]]
    assert prompts.coords[2, 1, 0] - prompts.coords[2, 0, 0] < 1e-5


# Classification


def test_detections_by_hand():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]], np.float32)
    probabilities = np.array([[0.64, 0.001], [0.36, 0.64], [0.002, 0.998]], np.float32)
    ious = np.array([1.5, 0.25, -0.5], np.float32)  # clipped to 1, 0.25, 0
    found = detections(boxes, probabilities, ious)
    # Box 1 overlaps with box 0 by 0.9: its class 0 goes. 0.001 is not above 0.001.
    assert found == [
        (0, 0, pytest.approx(0.8)),
        (1, 1, pytest.approx(0.4)),
        (2, 0, 0.0),
        (2, 1, 0.0),
    ]


def test_an_overlap_of_half_is_kept():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 5.01]], np.float32)
    ones = np.ones((3, 1), np.float32)
    assert [box for box, *_ in detections(boxes, ones, ones[:, 0])] == [0, 1]


def test_the_300_best_of_a_picture_are_kept():
    boxes = np.array([[20 * i, 0, 20 * i + 10, 10] for i in range(200)], np.float32)
    rng = np.random.default_rng(0)
    probabilities = rng.uniform(0.1, 1, (200, 2)).astype(np.float32)
    found = detections(boxes, probabilities, np.ones(200, np.float32))
    best = np.sort(np.sqrt(probabilities.ravel()))[-300:]
    assert sorted(score for *_, score in found) == pytest.approx(best.tolist())


def identity_vocabulary(names=NAMES):
    return Vocabulary(weights=20 * np.eye(len(names), dtype=np.float32), names=tuple(names))


def test_right_names_get_full_marks_and_wrong_ones_none(data):
    protocol = Classification.read(data.lvis, data.images, identity_vocabulary())
    scores = score(protocol, Knowing(data, right))
    assert scores["AP"] == scores["AP50"] == scores["APr"] == pytest.approx(100)
    wrong = {name: NAMES[(i + 1) % len(NAMES)] for i, name in enumerate(NAMES)}

    def misnamed(item, row, labels):
        return right(item, row, labels) | {"embedding": embedding(wrong[item.name])}

    # 20 times the identity: all other classes have a probability of 2e-9.
    assert score(protocol, Knowing(data, misnamed))["AP"] == 0


def test_no_detection_at_all_is_no_precision(data):
    names = [f"class {index}" for index in range(2000)]
    vocabulary = identity_vocabulary(NAMES)
    protocol = Classification.read(data.lvis, data.images, vocabulary)
    assert len(names) > 1 / 0.001
    assert protocol.score({picture.id: {"named": []} for picture in protocol.pictures}) == {
        name: 0 for name in LVIS_METRICS
    }


def test_concepts_are_matched_by_name_or_else_by_place(caplog):
    categories = [{"id": 7, "name": "aerosol_can"}, {"id": 3, "name": "Dog (animal)"}]
    caplog.set_level("INFO")
    by_name = identity_vocabulary(["dog animal", "aerosol can"])
    assert categories_of(by_name, categories) == [3, 7] and not caplog.text
    by_place = identity_vocabulary(["spray", "dog (animal)"])
    assert categories_of(by_place, categories) == [7, 3]
    assert "1 of 2 names differ, the first 'spray' and 'aerosol_can'" in caplog.text
    with pytest.raises(InputError, match=r"3 concepts, the annotations 2 categories.*--concepts"):
        categories_of(identity_vocabulary(["a", "b", "c"]), categories)


# Captions


def test_right_captions_get_full_marks_in_both_formats(data, no_java):
    for path in (data.vg_test, data.vg_regions):
        protocol = Captioning.read(path, data.images)
        assert protocol.num_regions == 2 * PICTURES
        scores = score(protocol, Knowing(data, right))
        assert scores.pop("METEOR") is None
        assert scores.pop("CIDEr") == pytest.approx(1000)
        assert scores == pytest.approx(dict.fromkeys(scores, 100)) and len(scores) == 4
        assert protocol.conditions["words by"] == "tap_deploy (without Java)"


def test_scores_of_captions_by_hand(no_java, caplog):
    """BLEU-1: 3 of 4 words, BLEU-2: 1 of 2 pairs; 4 words found against 5 true ones."""
    caplog.set_level("INFO")
    scores, words_by = caption_scores(["A red cat.", "dog"], ["a red dog", "Dog dog"])
    assert words_by == "tap_deploy (without Java)"
    brevity = math.exp(1 - 5 / 4)
    assert scores["BLEU-1"] == pytest.approx(100 * brevity * 3 / 4)
    assert scores["BLEU-2"] == pytest.approx(100 * brevity * math.sqrt(3 / 4 * 1 / 2))
    assert scores["METEOR"] is None and "apt-get install default-jre-headless" in caplog.text


def test_own_cider_equals_that_of_pycocoevalcap(no_java):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefgh"), rng.integers(1, 9))) for _ in range(400)]
    found, true = texts[:200], texts[200:]
    own = 100 * np.mean(cider_d(found, [[text] for text in true]))
    assert 20 < own < 200
    assert caption_scores(found, true)[0]["CIDEr"] == pytest.approx(own, rel=1e-12)


CAPTIONS = [
    "A small, red apple (on the left)!",
    "the dog's bone isn't here; it's THERE... can't you see?",
    "a t-shirt that says stop - 2 pm",
    "two men's hats & a woman's bag at 5:30",
    "white-and-black cat",
    "",
    "a caf\u00e9 au lait",
    "line\u2028break\ttab\nnew line",
]


@needs_java
def test_own_words_are_those_of_the_ptb_tokenizer(data):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = [item.caption for scene in data.scenes for item in scene.objects]
    captions += ["The man's watch isn't new.", 'a t-shirt, blue; "x"', "wi-fi at 5 pm"]
    split, words_by = tokenized(captions)
    assert words_by == "PTB tokenizer (Java)"
    library = PTBTokenizer().tokenize({i: [{"caption": c}] for i, c in enumerate(captions)})
    assert split == [library[i][0] for i in range(len(captions))]
    assert split == [" ".join(words(caption)) for caption in captions]
    assert len(tokenized(CAPTIONS)[0]) == len(CAPTIONS)  # a caption a line, whatever is in it


@needs_java
def test_without_a_working_java_captions_are_split_all_the_same(
    data, monkeypatch, tmp_path, caplog
):
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\necho no memory >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert tokenized(["A dog."]) == (["a dog"], "tap_deploy (without Java)")
    assert "the PTB tokenizer failed (exit code 1, 0 of 1 captions)" in caplog.text
    assert "no memory" in caplog.text
    assert caption_scores(["a dog"], ["a dog"])[0]["METEOR"] is None
    assert "METEOR is left out, its Java program failed" in caplog.text
    protocol = Captioning.read(data.vg_test, data.images)
    score(protocol, Knowing(data, right))
    assert protocol.conditions["words by"] == "tap_deploy (without Java)"


@needs_java
@pytest.mark.slow
def test_meteor_prefers_the_right_caption():
    said = ("a red dog on the left", "a red hound on the left", "two blue cars")
    scores = [caption_scores([text], ["a red dog on the left"])[0] for text in said]
    right, alike, wrong = (found["METEOR"] for found in scores)
    assert right == pytest.approx(100) and 0 <= wrong < alike < right


def test_pictures_of_another_size_than_annotated_are_refused(data, tmp_path):
    content = json.loads(data.coco.read_text())
    content["images"][0]["height"] += 1
    for entry in content["annotations"]:
        entry["segmentation"] = [[1, 1, 9, 1, 9, 9]]
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    protocol = Segmentation.read(COCO, path, data.images)
    with pytest.raises(InputError, match=r"64 x 64 pixels; the annotations say 64 x 65"):
        protocol.answer(Knowing(data, right), protocol.pictures[0])
