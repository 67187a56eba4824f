"""Annotation files that are malformed, and answers that a later run continues."""

from __future__ import annotations

import copy
import errno
import json
import os

import numpy as np
import pytest

pytest.importorskip("pycocotools")
pytest.importorskip("torch")

from made_data_sets import MadeData
from training_standin import NAMES, StandInScenes

from tap_deploy.errors import InputError, MissingDependencyError
from tap_deploy.evaluation.answers import Answers, Shard, file_name
from tap_deploy.evaluation.instances import COCO, LVIS, Instances
from tap_deploy.evaluation.modules import eval_module
from tap_deploy.evaluation.truth_masks import fills, truth_mask
from tap_deploy.evaluation.visual_genome import read_phrases
from tap_deploy.formats.coco import compressed_rles
from tap_deploy.masks import rle_from_mask

KEY = {"protocol": "coco-seg", "graphs": "abc"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return MadeData(tmp_path_factory.mktemp("data"), StandInScenes(), 4, NAMES)


def changed(path, folder, change):
    """A copy of a JSON file with a change."""
    content = copy.deepcopy(json.loads(path.read_text()))
    answer = change(content)
    file = folder / path.name
    file.write_text(json.dumps(content if answer is None else answer))
    return file


def put(*places, value):
    def change(content):
        for place in places[:-1]:
            content = content[place]
        content[places[-1]] = value

    return change


def drop(*places):
    def change(content):
        for place in places[:-1]:
            content = content[place]
        del content[places[-1]]

    return change


WRONG_INSTANCES = [
    (lambda content: [], "the file holds []; expected an object with 'images'"),
    (drop("annotations"), "the file has no 'annotations'; it has"),
    (put("images", value={}), "images is {}; expected a list"),
    (put("images", value=[]), "images is empty; expected at least one"),
    (put("images", 0, value=7), "images[0] is 7; expected an object"),
    (drop("images", 0, "height"), "images[0] has no 'height'; expected a whole number"),
    (put("images", 0, "height", value=0), "images[0] has height 0; expected a whole number of"),
    (put("images", 1, "id", value=1000), "images[1] has id 1000, which an earlier one has, too"),
    (drop("images", 0, "coco_url"), "image 1000 has neither coco_url nor file_name"),
    (put("images", 0, "coco_url", value="http://a/val2017/x.jpg"), "picture 1000 of the annotati"),
    (put("annotations", 0, "bbox", value=[1, 2, 3]), "annotations[0] has bbox [1, 2, 3]; expected"),
    (put("annotations", 0, "bbox", value=[1, 2, -3, 4]), "no size below 0"),
    (put("annotations", 0, "bbox", 0, value=float("nan")), "has bbox [NaN,"),
    (put("annotations", 0, "image_id", value=True), "image_id true; expected a whole number"),
    (put("annotations", 0, "category_id", value=99), "has category_id 99, which the annotations"),
    (put("annotations", 1, "id", value=1), "annotations[1] has id 1, which an earlier one has"),
    (put("annotations", 0, "segmentation", value=[[1, 2, 3]]), "expected polygons"),
    (
        put("annotations", 0, "segmentation", value=[[1e9, 1, 1e9, 2, 3, 4]]),
        "annotations[0] has a polygon with the coordinate 1e+09; expected pixels of a",
    ),
    (put("annotations", 1, "segmentation", "counts", value=[5]), "or run lengths with size and"),
    (put("annotations", 0, "area", value=10**400), "has area 1000"),
    (put("annotations", 0, "id", value=10**400), "expected a whole number below 2^53"),
    (put("images", 0, "width", value=1 << 20), "expected a whole number of at least 1 and at most"),
    (put("images", 0, "coco_url", value="x" * 5000), "picture 1000 of the annotations is not"),
    (
        put("annotations", 1, "segmentation", "counts", value="52"),  # 5 and 2 of 4096 pixels
        "annotations[1] has compressed run lengths that do not fill its picture of 64 x 64 pixels",
    ),
    (
        put("annotations", 1, "segmentation", value={"size": [2, 2], "counts": [4]}),
        "annotations[1] has run lengths of size [2, 2]; expected [64, 64], the size of its picture",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG_INSTANCES)
def test_malformed_instances_are_named(data, tmp_path, change, message):
    path = changed(data.coco, tmp_path, change)
    with pytest.raises(InputError) as error:
        Instances.read(path, data.images, COCO)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "--annotations" in str(error.value) or "--images" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("categories", 0, "frequency", value="x"), "frequency \"x\"; expected 'r', 'c' or 'f'"),
        (drop("images", 0, "neg_category_ids"), "has no 'neg_category_ids'; expected a list of"),
        (put("images", 0, "not_exhaustive_category_ids", value=["a"]), "expected a list of whole"),
    ],
)
def test_malformed_lvis_is_named(data, tmp_path, change, message):
    with pytest.raises(InputError, match=r"lvis_v1_val\.json") as error:
        Instances.read(changed(data.lvis, tmp_path, change), data.images, LVIS)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: {"results": content}, "the file has no 'annotations'; it has"),
        (put(0, "score", value="high"), 'entry[0] has score "high"; expected a finite number'),
        (put(0, "score", value=10**400), "entry[0] has score 1000"),
        (put(0, "image_id", value=3), "entry[0] has image_id 3, which the annotations do not list"),
        (put(0, "category_id", value=0), "entry[0] has category_id 0, which"),
        (lambda content: content[-1:], "none of 1 detections is in the 2 pictures to evaluate"),
    ],
)
def test_malformed_detections_are_named(data, tmp_path, change, message):
    instances = Instances.read(data.coco, data.images, COCO, limit=2)
    with pytest.raises(InputError, match="--detections") as error:
        instances.detections(changed(data.detections, tmp_path, change))
    assert message in str(error.value)


def test_detections_may_lie_under_annotations(data, tmp_path):
    instances = Instances.read(data.coco, data.images, COCO, limit=3)
    plain = instances.detections(data.detections)
    wrapped = changed(data.detections, tmp_path, lambda content: {"annotations": content})
    assert instances.detections(wrapped) == plain
    assert list(plain) == data.ids[:3] and all(len(found) == 2 for found in plain.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(0, "regions"), "entry[0] has no list 'regions'"),
        (drop(0, "regions", 0, "phrase"), "entry[0].regions[0] has no 'phrase'; expected text"),
        (put(0, "regions", 0, "width", value=-1), "entry[0] has a region with the box"),
        (lambda content: [{"id": 1000, "regions": []}], "none of the 1 pictures to evaluate has"),
        (lambda content: [], "entry is empty"),
    ],
)
def test_malformed_region_descriptions_are_named(data, tmp_path, change, message):
    with pytest.raises(InputError, match="--annotations") as error:
        read_phrases(changed(data.vg_regions, tmp_path, change), data.images)
    assert message in str(error.value)


def test_both_formats_of_visual_genome_say_the_same(data):
    pictures, phrases = read_phrases(data.vg_test, data.images)
    again, same = read_phrases(data.vg_regions, data.images)
    assert [picture.id for picture in pictures] == [picture.id for picture in again] == data.ids
    assert phrases == same
    limited, _ = read_phrases(data.vg_test, data.images, limit=2)
    assert limited == pictures[:2]


def test_files_that_are_no_json_are_named(data, tmp_path):
    path = tmp_path / "no.json"
    for content, message in ((b"{", "is not JSON"), (b"\xff", "is not JSON")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            Instances.read(path, data.images, COCO)
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match="is not JSON"):
        Instances.read(path, data.images, COCO)
    path.write_text('{"images": [], "images": []}')
    with pytest.raises(InputError, match="is not JSON: an object holds 'images' twice"):
        Instances.read(path, data.images, COCO)
    with pytest.raises(InputError, match="cannot be read: Is a directory; pass COCO instances"):
        Instances.read(tmp_path, data.images, COCO)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="cannot be read: it is a pipe"):
        Instances.read(tmp_path / "pipe", data.images, COCO)
    with path.open("wb") as file:
        file.truncate(3 << 30)  # a hole: it takes no space
    with pytest.raises(InputError, match="cannot be read: it has 3221225472 bytes; expected at"):
        Instances.read(path, data.images, COCO)
    with pytest.raises(InputError, match="is not a folder"):
        Instances.read(data.coco, tmp_path / "nowhere", COCO)


def test_compressed_run_lengths_that_the_library_writes_fill_the_picture():
    rng = np.random.default_rng(0)
    for share in (0, 0.001, 0.5, 0.99, 1):
        mask = rng.random((300, 170)) < share
        (rle,) = compressed_rles([rle_from_mask(mask)])
        assert fills(rle["counts"], mask.size)
        assert not fills(rle["counts"], mask.size + 1)
        assert not fills(rle["counts"] + "1", mask.size)


@pytest.mark.parametrize("counts", ["", "52", "P", "oooooooo0", "é", "4\0", "O5", "~"])
def test_malformed_compressed_run_lengths_do_not_fill_a_picture(counts):
    assert not fills(counts, 4)
    assert fills("4", 4) and fills("031", 4)


def test_a_picture_is_also_found_by_its_file_name(data, tmp_path):
    for number in data.ids:
        (tmp_path / f"my {number}.png").write_bytes((data.images / f"{number}.png").read_bytes())

    def rename(content):
        for image in content["images"]:
            image["file_name"] = f"my {image['id']}.png"

    path = changed(data.coco, tmp_path, rename)
    found = Instances.read(path, tmp_path, COCO)
    assert [each.path.name for each in found.pictures] == [f"my {n}.png" for n in data.ids]
    found = Instances.read(path, data.images, COCO)  # the URL goes first
    assert found.pictures[0].path.parent.name == "val2017"


def test_a_mask_that_the_library_cannot_read_is_named():
    with pytest.raises(InputError, match="the mask of annotation 3 cannot be read"):
        truth_mask({"id": 3, "segmentation": [[1, 2]]}, 10, 10)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "tap-deploy\[eval\]"'):
        eval_module("pycocoevalcap.cider.cider")


# Answers


def test_answers_are_continued(tmp_path):
    with Answers.opened(tmp_path / "new", KEY, resume=False) as answers:
        answers.add(7, {"captions": ["a"]})
        answers.add(9, {"captions": []})
    with Answers.opened(tmp_path / "new", KEY, resume=True) as answers:
        assert answers.done == {7, 9}
        answers.add(8, {"captions": ["b"]})
        assert list(answers.read()) == [7, 9, 8]
        assert answers.read()[8] == {"captions": ["b"]}


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_torn_last_line_is_dropped(tmp_path, cut):
    with Answers.opened(tmp_path, KEY, resume=False) as answers:
        answers.add(7, {"captions": ["a"]})
        answers.add(9, {"captions": ["b"]})
    content = answers.path.read_bytes()
    answers.path.write_bytes(content[:-cut])
    with Answers.opened(tmp_path, KEY, resume=True) as again:
        assert again.done == {7}
        again.add(9, {"captions": ["b"]})
    assert again.path.read_bytes() == content


def test_a_torn_first_line_begins_anew(tmp_path):
    with Answers.opened(tmp_path, KEY, resume=False) as answers:
        pass
    answers.path.write_bytes(answers.path.read_bytes()[:-3])
    with Answers.opened(tmp_path, KEY, resume=False) as again:
        again.add(1, {})
        assert again.read() == {1: {}}


def test_answers_are_not_overwritten_or_mixed(tmp_path):
    with Answers.opened(tmp_path, KEY, resume=False) as answers:
        answers.add(7, {})
        with (
            pytest.raises(InputError, match="is in use by another evaluation"),
            Answers.opened(tmp_path, KEY, resume=True),
        ):
            pass
    with (
        pytest.raises(InputError, match="has answers for 1 pictures; pass --resume"),
        Answers.opened(tmp_path, KEY, resume=False),
    ):
        pass
    assert file_name(KEY) != file_name(KEY | {"graphs": "other"})
    other = json.dumps({"key": {}}).encode()
    damages = (
        (other, "another evaluation"),
        (b"{}\n{]", "damaged in line 2"),
        (b"[" * 100_000, "damaged in line 1"),
    )
    for content, message in damages:
        answers.path.write_bytes(content + b"\n")
        with (
            pytest.raises(InputError, match=message),
            Answers.opened(tmp_path, KEY, resume=True),
        ):
            pass


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with Answers.opened(tmp_path, KEY, resume=False) as answers:
        answers.add(7, {})
        assert answers.read() == {7: {}}
    assert "cannot be locked ([Errno 37] No locks available): do not run two" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="cannot write"),
        Answers.opened(tmp_path / "file", KEY, resume=False),
    ):
        pass


def test_answers_of_shards_come_together(tmp_path):
    for index, pictures in ((0, (7, 9)), (1, (8,))):
        shard = Shard.from_text(f"{index}/2")
        with Answers.opened(tmp_path, KEY, resume=False, shard=shard) as answers:
            for picture in pictures:
                answers.add(picture, {"by": index})
    with answers.path.open("ab") as file:
        file.write(b'{"image_id": 10, "ans')  # it was killed
    with (
        pytest.raises(InputError, match="has answers for 3 pictures; pass --resume"),
        Answers.opened(tmp_path, KEY, resume=False),
    ):
        pass
    with Answers.opened(tmp_path, KEY, resume=True) as all_of_it:
        assert all_of_it.done == {7, 8, 9}
        all_of_it.add(10, {"by": 2})
        assert {n: found["by"] for n, found in all_of_it.read().items()} == {
            7: 0,
            9: 0,
            8: 1,
            10: 2,
        }
    with Answers.opened(tmp_path, KEY, resume=True, shard=Shard(index=1, count=2)) as again:
        assert again.done == {8}


@pytest.mark.parametrize("text", ["2/2", "a/2", "1", "-1/2", "0/0", "1/2/3"])
def test_a_shard_that_does_not_exist_is_refused(text):
    with pytest.raises(InputError, match=r"shard is .*; expected I/N"):
        Shard.from_text(text)
