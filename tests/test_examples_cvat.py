"""The CVAT function, called as CVAT calls it and read as CVAT reads it.

Requests and answers follow ``cvat/apps/lambda_manager/views.py`` of cvat-ai/cvat (releases 2.x):
``LambdaFunction.__init__`` reads the annotations, ``LambdaFunction.invoke`` makes the body of a
request, filters shapes by label and attributes, and ``LambdaJob._call_detector`` takes the masks
apart. nuclio-sdk, the package within nuclio's containers, decodes the body of an event.
"""

from __future__ import annotations

import base64
import json
import logging
import pathlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import nuclio_sdk
import numpy as np
import pytest
import scipy.ndimage
import yaml
from PIL import Image, ImageDraw

from tap_deploy import TapPredictor
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.demo_model import DemoModel
from tap_deploy.masks import mask_iou
from tests.example_files import EXAMPLES, load

FOLDER = EXAMPLES / "cvat"
SCENE = DemoModel().samples / "1.png"  # a rabbit, a monkey, a fire extinguisher

Json = dict[str, Any]

# What nuclio's processor hands to a Python worker, besides the body of the request.
MESSAGE = {
    "content_type": "application/json",
    "trigger": {"kind": "http", "name": "http"},
    "fields": {},
    "headers": {"Content-Type": "application/json"},
    "id": "1",
    "method": "POST",
    "path": "/",
    "size": 0,
    "timestamp": 0,
    "url": "",
    "shard_id": 0,
    "num_shards": 0,
    "type": "",
    "type_version": "",
    "version": "",
}
pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcfromtimestamp")  # nuclio-sdk


@pytest.fixture
def function(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("TAP_BUNDLE", str(demo_bundle.path))
    module = load("cvat", "main")
    yield module
    module.predictor().close()
    del sys.modules["main"]


@pytest.fixture(scope="module")
def tap(demo_bundle: Bundle) -> Iterator[TapPredictor]:
    with TapPredictor.from_bundle(demo_bundle.path) as predictor:
        yield predictor


@pytest.fixture
def context(function: Any) -> Any:
    made = types.SimpleNamespace(
        logger=logging.getLogger("nuclio"), user_data=types.SimpleNamespace()
    )
    made.Response = nuclio_sdk.Response
    function.init_context(made)
    return made


def in_base64(path: pathlib.Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("utf-8")


def interactor_request(path: pathlib.Path, pos: Any, neg: Any, box: Any = None) -> Json:
    return {"image": in_base64(path), "pos_points": pos, "neg_points": neg, "obj_bbox": box}


def detector_request(path: pathlib.Path, threshold: float | None = None) -> Json:
    chosen = {"threshold": threshold} if threshold else {}
    return chosen | {"image": in_base64(path)}


def called(function: Any, context: Any, request: Json, status: int = 200) -> Any:
    """Return the decoded answer to a request that CVAT posts as JSON."""
    kind = nuclio_sdk.event.EventDeserializerKinds.msgpack
    event = nuclio_sdk.Event.deserialize(MESSAGE | {"body": json.dumps(request).encode()}, kind)
    response = function.handler(context, event)
    assert response.status_code == status, response.body
    assert response.content_type == "application/json"
    return json.loads(response.body)


def annotations(name: str) -> dict[str, str]:
    """The annotations of a function as nuclio keeps them: texts."""
    settings = yaml.safe_load((FOLDER / name).read_text("utf-8"))
    found = settings["metadata"]["annotations"]
    assert all(isinstance(value, str) for value in found.values())
    return dict(found)


def test_cvat_reads_the_annotations_of_the_interactor():
    found = annotations("function.yaml")
    assert found["type"] == "interactor"
    assert json.loads(found["spec"] or "[]") == []
    assert int(found["min_pos_points"]) == 1
    assert int(found["min_neg_points"]) == 0
    assert int(found["version"]) == 2
    assert found["startswith_box_optional"] == "true"
    assert "startswith_box" not in found  # any text would be true
    assert found["help_message"]


def test_cvat_reads_the_labels_of_the_detector(function):
    found = annotations("function-detector.yaml")
    assert found["type"] == "detector"
    labels = json.loads(found["spec"])
    names = [label["name"] for label in labels]
    assert len(set(names)) == len(names) > 1
    for label in labels:
        assert label["type"] == "mask"
        [attribute] = label["attributes"]
        assert set(attribute) == {"name", "input_type", "values"}
        assert attribute["input_type"] == "text"
    assert set(names) == function.wanted_names()
    assert set(names) <= set(function.predictor().vocabulary.names)


@pytest.mark.parametrize("name", ["function.yaml", "function-detector.yaml"])
def test_settings_name_the_handler_and_the_environment(name):
    spec = yaml.safe_load((FOLDER / name).read_text("utf-8"))["spec"]
    module, entry = spec["handler"].split(":")
    assert f"def {entry}(" in (FOLDER / f"{module}.py").read_text("utf-8")
    assert {item["name"] for item in spec["env"]} == {"TAP_BUNDLE", "TAP_BACKEND", "TAP_PRECISION"}


def test_a_click_gets_the_mask_of_the_predictor(function, context, tap):
    answer = called(function, context, interactor_request(SCENE, [[120, 223]], []))
    mask = np.array(answer["mask"])
    expected = tap.predict(SCENE, points=[[[120, 223, 1]]], captions=False).masks
    assert expected is not None
    assert set(np.unique(mask)) == {0, 1}
    np.testing.assert_array_equal(mask == 1, expected[0])


def test_clicks_outside_and_a_box_reach_the_predictor(function, context, tap):
    request = interactor_request(SCENE, [[115, 215]], [[186, 200]], [[80, 160], [150, 250]])
    points, boxes = [[[115, 215, 1], [186, 200, 0]]], [[80, 160, 150, 250]]
    expected = tap.predict(SCENE, points=points, boxes=boxes).masks
    assert expected is not None
    mask = np.array(called(function, context, request)["mask"]) == 1
    np.testing.assert_array_equal(mask, expected[0])
    alone = tap.predict(SCENE, points=points).masks
    assert alone is not None and (alone[0] != mask).any()  # the box counts


@pytest.mark.parametrize("corners", [[[211, 96], [239, 156]], [[239, 156], [211, 96]]])
def test_a_box_alone_is_a_prompt(function, context, tap, corners):
    request = interactor_request(SCENE, [], [], corners)
    expected = tap.predict(SCENE, boxes=[[211, 96, 239, 156]]).masks
    assert expected is not None
    mask = np.array(called(function, context, request)["mask"]) == 1
    np.testing.assert_array_equal(mask, expected[0])


def test_no_box_is_sent_as_an_empty_list_or_as_null(function, context):
    null = called(function, context, interactor_request(SCENE, [[120, 223]], [], None))
    nothing = called(function, context, interactor_request(SCENE, [[120, 223]], [], []))
    assert null == nothing


def test_a_click_beside_the_picture_is_moved_into_it(function, context):
    request = interactor_request(SCENE, [[255.9, 256.4]], [[-0.3, 10]])
    assert np.shape(called(function, context, request)["mask"]) == (256, 256)


def test_a_turned_grey_photograph_has_the_mask_of_the_upright_one(function, context, tmp_path):
    photo = Image.open(SCENE).convert("L").crop((0, 0, 200, 256))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.rotate(90, expand=True).save(tmp_path / "a.png", exif=exif)
    answer = called(function, context, interactor_request(tmp_path / "a.png", [[120, 223]], []))
    assert np.shape(answer["mask"]) == (256, 200)


def test_the_next_click_on_a_picture_encodes_nothing(function, context, monkeypatch):
    encode, count = function.predictor().encode, []
    monkeypatch.setattr(
        function.predictor(), "encode", lambda picture: count.append(1) or encode(picture)
    )
    for x in (100, 110, 120):
        called(function, context, interactor_request(SCENE, [[x, 223]], []))
    assert len(count) == 1
    called(function, context, interactor_request(DemoModel().samples / "2.png", [[50, 50]], []))
    assert len(count) == 2
    assert function.encoded.cache_info().maxsize == function.PICTURES


@pytest.mark.parametrize("file", [b"", b"no picture"])
def test_what_is_no_picture_is_an_error_of_the_request(function, context, tmp_path, file):
    (tmp_path / "a.png").write_bytes(file)
    request = interactor_request(tmp_path / "a.png", [[1, 1]], [])
    assert "picture" in called(function, context, request, status=400)["error"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"pos_points": [[1, 1]]}, "the request has no image"),
        ({"image": None}, "the request has no image"),
        ([1], "the request has no image"),
        ({"image": "not base64!"}, "image is not in base64"),
        ({"image": "A"}, "image is not in base64"),
    ],
)
def test_a_request_without_a_picture_is_an_error_of_the_request(function, context, body, message):
    assert called(function, context, body, 400)["error"].startswith(message)


def test_what_is_no_json_is_an_error_of_the_request(function, context):
    """nuclio-sdk leaves such a body as it is."""
    kind = nuclio_sdk.event.EventDeserializerKinds.msgpack
    message = MESSAGE | {"content_type": "text/plain", "body": b"image"}
    event = nuclio_sdk.Event.deserialize(message, kind)
    assert event.body == b"image"
    assert function.handler(context, event).status_code == 400


@pytest.mark.parametrize(
    ("pos", "neg", "box"),
    [
        (5, [], None),
        ([5], [], None),
        ([[1]], [], None),
        ([["x", 1]], [], None),
        ([[1, 1]], [None], None),
        ([[1, 1]], [], [1, 2, 3]),
        ([[1, 1]], [], [["a", "b"], ["c", "d"]]),
        ([[1, 1]], [], {"x": 1}),
    ],
)
def test_prompts_that_are_none_are_an_error_of_the_request(function, context, pos, neg, box):
    request = interactor_request(SCENE, pos, neg, box)
    assert "expected lists of [x, y]" in called(function, context, request, 400)["error"]


@pytest.mark.parametrize("threshold", ["high", 2, [0.5]])
def test_a_threshold_that_is_none_is_an_error_of_the_request(function, context, threshold):
    request = detector_request(SCENE, threshold)
    assert "only_thresh" in called(function, context, request, 400)["error"]


def test_no_prompt_is_an_error_of_the_request(function, context):
    assert "region 0" in called(function, context, interactor_request(SCENE, [], []), 400)["error"]


def decoded(values: list[int], height: int, width: int) -> np.ndarray:
    """The mask of a shape, bool [H, W]: CVAT takes the last four values as an inclusive box."""
    left, top, right, bottom = values[-4:]
    mask = np.zeros((height, width), np.bool_)
    part = np.array(values[:-4]).reshape(bottom - top + 1, right - left + 1)
    assert set(np.unique(part)) <= {0, 1}
    assert part[0].any() and part[-1].any() and part[:, 0].any() and part[:, -1].any()
    mask[top : bottom + 1, left : right + 1] = part == 1
    return mask


def test_the_detector_finds_what_its_labels_name(function, context, tap):
    shapes = called(function, context, detector_request(SCENE))
    names = sorted(function.wanted_names())
    expected = tap.everything(SCENE, points_per_side=16, only=names, only_thresh=0.3, masks=True)
    assert expected.masks is not None and expected.captions is not None
    assert [shape["label"] for shape in shapes] == [expected.name(i) for i in range(len(expected))]
    assert {"rabbit", "monkey"} <= {shape["label"] for shape in shapes} <= set(names)
    for index, shape in enumerate(shapes):
        assert shape["type"] == "mask"
        np.testing.assert_array_equal(decoded(shape["mask"], 256, 256), expected.masks[index])
        assert shape["attributes"] == [{"name": "caption", "value": expected.captions[index]}]
        likeliest = expected.likeliest(index)
        assert likeliest is not None
        assert float(shape["confidence"]) == pytest.approx(likeliest[1], abs=1e-3)


def test_an_outline_goes_around_the_largest_part_of_a_mask(function, context):
    for shape in called(function, context, detector_request(SCENE)):
        parts, _ = scipy.ndimage.label(decoded(shape["mask"], 256, 256))
        largest = parts == np.bincount(parts.ravel())[1:].argmax() + 1
        drawn = Image.new("1", (256 * 4, 256 * 4))
        ImageDraw.Draw(drawn).polygon([4 * value for value in shape["points"]], fill=1)
        found = np.asarray(drawn)[2::4, 2::4]  # middles of pixels
        assert mask_iou(found, scipy.ndimage.binary_fill_holes(largest)) > 0.97


def test_the_threshold_of_a_request_counts(function, context):
    few = called(function, context, detector_request(SCENE, 0.9))
    many = called(function, context, detector_request(SCENE, 0.0001))
    assert {shape["label"] for shape in few} == {"rabbit", "monkey"}
    assert len(many) > len(few)
    # A region whose likeliest name is none of the labels has the likeliest one of them.
    assert {shape["label"] for shape in many} <= function.wanted_names()


def test_a_label_that_the_model_does_not_know_is_named(function, context, monkeypatch, tmp_path):
    text = (FOLDER / "function-detector.yaml").read_text("utf-8").replace("rabbit", "rabit")
    (tmp_path / "function-detector.yaml").write_text(text, "utf-8")
    monkeypatch.setattr(function, "DETECTOR", tmp_path / "function-detector.yaml")
    assert "rabbit" in called(function, context, detector_request(SCENE), status=400)["error"]


def test_an_answer_is_json_of_plain_numbers(function, context):
    event = types.SimpleNamespace(body=interactor_request(SCENE, [[120, 223]], []))
    body = function.handler(context, event).body
    assert len(body) < 2 * 256 * 256 + 2 * 256 + 30  # no spaces: a picture has millions of pixels
    assert body.startswith('{"mask":[[')
