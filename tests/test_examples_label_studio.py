"""The Label Studio backend, on the JSON that Label Studio posts.

Requests follow ``label_studio_ml/api.py`` of HumanSignal/label-studio-ml-backend, and results the
samples of its examples. The SDK, half a gigabyte with its dependencies, is not installed here:
``label_studio_sdk`` below stands in for what the adapter uses of it.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import types
import xml.etree.ElementTree
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest

from tap_deploy import TapPredictor
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.demo_model import DemoModel
from tests.example_files import EXAMPLES, load

SAMPLES = DemoModel().samples
SCENE = SAMPLES / "1.png"  # a rabbit, a monkey, a fire extinguisher

Json = dict[str, Any]

CONFIG = """
<View>
  <Image name="image" value="$picture" zoom="true"/>
  <BrushLabels name="mask" toName="image" model_score_threshold="0.5">
    <Label value="rabbit"/>
    <Label value="Ape" predicted_values="monkey, gorilla"/>
  </BrushLabels>
  <KeyPointLabels name="click" toName="image" smart="true">
    <Label value="rabbit"/>
    <Label value="Ape"/>
  </KeyPointLabels>
  <RectangleLabels name="box" toName="image" smart="true">
    <Label value="rabbit"/>
    <Label value="Ape"/>
  </RectangleLabels>
  <TextArea name="caption" toName="image" perRegion="true" editable="true"/>
</View>
"""
BOXES_ONLY = """
<View>
  <Image name="image" value="$picture"/>
  <RectangleLabels name="box" toName="image"><Label value="rabbit"/></RectangleLabels>
</View>
"""


class StandIn:
    """``LabelStudioMLBase``: made for every request, from its labelling configuration."""

    failures: ClassVar[dict[str, Exception]] = {}  # URL -> error of its download

    def __init__(self, project_id: str | None = None, label_config: str = "") -> None:
        self.kept: dict[str, str] = {}
        self.root = xml.etree.ElementTree.fromstring(label_config)
        self.label_interface = types.SimpleNamespace(
            get_control=lambda name: types.SimpleNamespace(attr=self._tag(name).attrib)
        )
        self.setup()

    def setup(self) -> None: ...

    def set(self, key: str, value: str) -> None:
        self.kept[key] = value

    def _tag(self, name: str) -> Any:
        return self.root.find(f".//*[@name='{name}']")

    def get_first_tag_occurence(self, control: str, kind: str) -> tuple[str, str, str]:
        for tag in self.root.iter(control):
            image = self._tag(tag.attrib["toName"])
            if image.tag == kind:
                return tag.attrib["name"], image.attrib["name"], image.attrib["value"][1:]
        raise ValueError(f"No control tag of type {control}")

    def build_label_map(self, name: str, names: Any) -> dict[str, str]:
        found = {}
        for label in self._tag(name).iter("Label"):
            values = label.attrib.get("predicted_values", "").split(",")
            known = [value.strip() for value in values if value.strip() in names]
            found |= dict.fromkeys(known or [label.attrib["value"]], label.attrib["value"])
        return found

    def get_local_path(self, url: str, task_id: int | None = None) -> str:
        assert task_id is not None  # the SDK needs it for pictures in the cloud
        if url in self.failures:
            raise self.failures[url]
        return str(SAMPLES / url.rsplit("/", 1)[1])


@pytest.fixture
def answers(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("TAP_BUNDLE", str(demo_bundle.path))
    load("label_studio", "brush")
    module = load("label_studio", "answers")
    yield module
    module.predictor().close()
    for name in ("answers", "brush", "model", "_wsgi"):
        sys.modules.pop(name, None)


@pytest.fixture
def backend(answers: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class that the SDK's server runs."""
    base = types.ModuleType("label_studio_ml.model")
    base.LabelStudioMLBase = StandIn  # type: ignore[attr-defined]
    response = types.ModuleType("label_studio_ml.response")
    response.ModelResponse = types.SimpleNamespace  # type: ignore[attr-defined]
    for module in (types.ModuleType("label_studio_ml"), base, response):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return load("label_studio", "model").TapBackend


@pytest.fixture(scope="module")
def tap(demo_bundle: Bundle) -> Iterator[TapPredictor]:
    with TapPredictor.from_bundle(demo_bundle.path) as predictor:
        yield predictor


def request(*files: str, context: Json | None = None, config: str = CONFIG) -> Json:
    """The body of a request to ``/predict``."""
    tasks = [
        {"id": number, "data": {"picture": f"/data/upload/1/{file}"}}
        for number, file in enumerate(files, 1)
    ]
    params = {"login": None, "password": None, "context": context}
    body = {"tasks": tasks, "project": "3.1795000000", "label_config": config, "params": params}
    return json.loads(json.dumps(body))  # type: ignore[no-any-return]


def called(backend: Any, body: Json) -> list[Json]:
    """Return the predictions to a request, as the server calls the class and sends its answer."""
    model = backend(project_id=body["project"].split(".")[0], label_config=body["label_config"])
    params = body["params"]
    context = params.pop("context", {})
    predictions = model.predict(body["tasks"], context=context, **params).predictions
    return json.loads(json.dumps(predictions))  # type: ignore[no-any-return]


def click(x: float, y: float, label: str = "rabbit", positive: bool = True) -> Json:
    """A smart click on a picture of 256 x 256 pixels, at x and y in pixels."""
    value = {"x": x / 2.56, "y": y / 2.56, "width": 0.3, "labels": [label]}
    return shared("click", "keypointlabels", value | {"keypointlabels": [label]}) | {
        "is_positive": positive
    }


def rectangle(x0: float, y0: float, x1: float, y1: float, label: str = "rabbit") -> Json:
    sides = {"width": (x1 - x0) / 2.56, "height": (y1 - y0) / 2.56, "rotation": 0}
    value = {"x": x0 / 2.56, "y": y0 / 2.56, **sides, "rectanglelabels": [label]}
    return shared("box", "rectanglelabels", value)


def shared(tag: str, kind: str, value: Json) -> Json:
    sizes = {"original_width": 256, "original_height": 256, "image_rotation": 0}
    names = {"id": "fBWv1t0S2L", "from_name": tag, "to_name": "image", "origin": "manual"}
    return {**sizes, **names, "type": kind, "value": value}


def decoded(rle: list[int]) -> np.ndarray:
    """The values of run lengths, uint8 [n], read bit by bit as ``examples/…/brush.py`` says."""
    bits = iter("".join(f"{byte:08b}" for byte in rle))

    def number(size: int) -> int:
        return int("".join(next(bits) for _ in range(size)), 2)

    count, value_bits = number(32), number(5) + 1
    length_bits = [number(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < count:
        is_run, length = number(1), number(length_bits[number(2)]) + 1
        if is_run:
            values += [number(value_bits)] * length
        else:
            values += [number(value_bits) for _ in range(length)]
    assert len(values) == count
    rest = list(bits)
    assert len(rest) < 8 and set(rest) <= {"0"}
    return np.array(values, np.uint8)


def mask_of(result: Json) -> np.ndarray:
    assert result["value"]["format"] == "rle"
    values = decoded(result["value"]["rle"])
    pixels = values.reshape(result["original_height"], result["original_width"], 4)
    assert (pixels == pixels[..., 3:]).all()
    return pixels[..., 3] == 255


MASKS = {
    "all": np.ones((7, 5), np.bool_),
    "none": np.zeros((7, 5), np.bool_),
    "one pixel": np.eye(1, 9, 4).astype(np.bool_),
    "first and last": np.arange(40).reshape(5, 8) % 39 == 0,
    "noise": np.random.default_rng(0).random((33, 57)) < 0.5,
    "longer than a run may be": np.arange(400 * 300).reshape(300, 400) > 50_000,
    "lengths around the steps": np.repeat([True, False] * 5, [1, 2, 3, 4, 5, 63, 64, 65, 1, 9])[
        None
    ],
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_survives_the_brush_format(answers, name):
    mask = MASKS[name]
    found = decoded(answers.brush_rle(mask)).reshape(*mask.shape, 4)
    np.testing.assert_array_equal(found, np.repeat(mask[..., None], 4, axis=2) * 255)


def test_a_click_gets_a_mask_its_label_and_a_caption(backend, tap):
    [prediction] = called(backend, request("1.png", context={"result": [click(120, 223)]}))
    expected = tap.predict(SCENE, points=[[[120, 223, 1]]])
    assert expected.masks is not None and expected.captions is not None
    mask, caption = prediction["result"]
    np.testing.assert_array_equal(mask_of(mask), expected.masks[0])
    assert (mask["type"], mask["from_name"], mask["to_name"]) == ("brushlabels", "mask", "image")
    assert mask["value"]["brushlabels"] == ["rabbit"]
    assert caption["id"] == mask["id"]  # or the text would belong to the whole picture
    assert (caption["type"], caption["from_name"]) == ("textarea", "caption")
    assert caption["value"] == {"text": [expected.captions[0]]}
    score = pytest.approx(float(expected.iou_predictions[0]))
    assert prediction["score"] == mask["score"] == score


def test_all_clicks_and_the_box_make_one_region(backend, tap):
    prompts = [rectangle(80, 160, 150, 250), click(115, 215), click(186, 200, "Ape", False)]
    [prediction] = called(backend, request("1.png", context={"result": prompts}))
    expected = tap.predict(
        SCENE, points=[[[115, 215, 1], [186, 200, 0]]], boxes=[[80, 160, 150, 250]]
    )
    assert expected.masks is not None
    mask, _ = prediction["result"]
    np.testing.assert_array_equal(mask_of(mask), expected.masks[0])
    assert mask["value"]["brushlabels"] == ["Ape"]  # that of the last prompt


def test_coordinates_are_percent_of_the_upright_picture(answers):
    prompts = {
        "result": [rectangle(64, 128, 128, 192), click(25.6, 51.2), {"type": "x", "value": {}}]
    }
    points, box, label = answers.prompt_from_context(prompts, width=1000, height=500)
    assert np.allclose(points, [[100, 100, 1]])
    assert np.allclose(box, [250, 250, 500, 375])
    assert label == "rabbit"


def test_the_next_click_on_a_picture_encodes_nothing(backend, answers, monkeypatch):
    encode, count = answers.predictor().encode, []
    monkeypatch.setattr(
        answers.predictor(), "encode", lambda picture: count.append(1) or encode(picture)
    )
    for x in (100, 110, 120):
        called(backend, request("1.png", context={"result": [click(x, 223)]}))
    assert len(count) == 1
    called(backend, request("2.png", context={"result": [click(50, 50)]}))
    assert len(count) == 2


def test_without_a_prompt_the_labels_are_searched_for(backend, tap):
    [prediction] = called(backend, request("1.png"))
    names = {"monkey": "Ape", "rabbit": "rabbit"}
    expected = tap.everything(
        SCENE, points_per_side=16, only=list(names), only_thresh=0.5, masks=True
    )
    assert expected.masks is not None and expected.captions is not None
    masks, captions = prediction["result"][::2], prediction["result"][1::2]
    assert [mask["value"]["brushlabels"] for mask in masks] == [
        [names[expected.name(index) or ""]] for index in range(len(expected))
    ]
    assert {mask["value"]["brushlabels"][0] for mask in masks} == {"Ape", "rabbit"}
    for index, mask in enumerate(masks):
        np.testing.assert_array_equal(mask_of(mask), expected.masks[index])
        assert captions[index]["value"]["text"] == [expected.captions[index]]
        assert captions[index]["id"] == mask["id"]
    assert len({mask["id"] for mask in masks}) == len(masks) == 2
    assert prediction["score"] == pytest.approx(expected.iou_predictions.mean())


def test_boxes_in_place_of_masks_where_the_configuration_has_no_brush(backend, tap):
    [prediction] = called(backend, request("1.png", config=BOXES_ONLY))
    expected = tap.everything(SCENE, points_per_side=16, only=["rabbit"], captions=False)
    [result] = prediction["result"]  # no caption either
    box = expected.box(0)
    assert box is not None
    value = result["value"]
    found = [value[key] * 2.56 for key in ("x", "y", "width", "height")]
    assert found == pytest.approx(box)
    assert value["rectanglelabels"] == ["rabbit"]
    assert (result["type"], result["from_name"]) == ("rectanglelabels", "box")


def test_labels_that_the_model_does_not_know_find_nothing(backend):
    config = BOXES_ONLY.replace("rabbit", "spaceship")
    assert called(backend, request("1.png", config=config)) == [{"result": [], "score": 0.0}]


def test_a_context_without_prompts_finds_nothing(backend):
    other = shared("mask", "brushlabels", {"format": "rle", "rle": [], "brushlabels": ["rabbit"]})
    [prediction] = called(backend, request("1.png", context={"result": [other]}))
    assert prediction == {"result": [], "score": 0.0}


def test_a_bad_picture_leaves_the_other_tasks_their_predictions(backend, caplog):
    first, second = called(backend, request("samples.json", "1.png"))
    assert first == {"result": [], "score": 0.0}
    assert len(second["result"]) == 4
    assert "task 1: " in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        OSError("404 Client Error: Not Found for url"),  # those of requests are such
        ValueError("Invalid path: ../a.png"),
        Exception("Label Studio Task ID is required\nfor cloud storage files"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_picture_that_cannot_be_fetched_leaves_the_others_theirs(
    backend, caplog, monkeypatch, error
):
    monkeypatch.setattr(StandIn, "failures", {"/data/upload/1/2.png": error})
    first, second = called(backend, request("2.png", "1.png"))
    assert first == {"result": [], "score": 0.0}
    assert len(second["result"]) == 4
    [record] = caplog.records
    cause = f"{type(error).__name__}: {error}".replace("\n", " ")
    assert record.getMessage() == f"task 1: cannot fetch the picture: {cause}"


@pytest.mark.parametrize("data", [{}, {"picture": "/data/upload/1/gone.png"}])
def test_a_task_without_a_picture_leaves_the_others_theirs(backend, caplog, data):
    body = request("2.png", "1.png")
    body["tasks"][0]["data"] = data
    first, second = called(backend, body)
    assert first == {"result": [], "score": 0.0}
    assert len(second["result"]) == 4
    assert "task 1: cannot fetch the picture: " in caplog.text


def test_the_server_loads_the_model_once_for_all_threads(backend, answers, monkeypatch):
    loads = []

    def slow(*words: str) -> Any:
        loads.append(words)
        time.sleep(0.2)  # so that all threads would ask meanwhile
        return types.SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(answers.TapPredictor, "from_bundle", slow)
    api = types.ModuleType("label_studio_ml.api")
    api.init_app = lambda model_class: model_class  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, api.__name__, api)
    assert load("label_studio", "_wsgi").app is backend
    threads = [threading.Thread(target=answers.predictor) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1


def test_the_sdk_is_that_of_one_commit():
    text = (EXAMPLES / "label_studio" / "requirements.txt").read_text("utf-8")
    assert re.search(r"label-studio-ml @ git\+https://\S+\.git@[0-9a-f]{40}\n", text)


def test_predictions_say_which_model_made_them(backend, demo_bundle):
    assert backend(label_config=CONFIG).kept == {"model_version": f"{demo_bundle.path.name}-fp32"}
