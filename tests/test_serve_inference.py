"""The Open Inference Protocol, spoken by NVIDIA's client and by hand."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("fastapi")
triton = pytest.importorskip("tritonclient.http")
from tritonclient.utils import InferenceServerException

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.demo_model import DemoModel
from tap_deploy.image import load_image
from tap_deploy.predictor import TapPredictor
from tests.served import Served, served

PICTURE = (DemoModel().samples / "1.png").read_bytes()
BOXES = np.array([[80, 120, 160, 240], [211, 96, 239, 156]], np.float32)
POINTS = np.array([[[120, 223, 1], [0, 0, 4]], [[225, 120, 1], [60, 60, 0]]], np.float32)
OUTPUTS = ["masks", "bboxes", "iou_predictions", "names", "probabilities", "captions"]


@pytest.fixture(scope="module")
def predictor(demo_bundle: Bundle) -> Iterator[TapPredictor]:
    with TapPredictor.from_bundle(demo_bundle.path) as predictor:
        yield predictor


@pytest.fixture(scope="module")
def server(demo_bundle: Bundle) -> Iterator[Served]:
    with served(lambda: TapPredictor.from_bundle(demo_bundle.path)) as running:
        yield running


@pytest.fixture
def client(server: Served):
    with triton.InferenceServerClient(server.address.removeprefix("http://")) as client:
        yield client


def picture_input(binary=True):
    given = triton.InferInput("image", [1], "BYTES")
    content = PICTURE if binary else base64.b64encode(PICTURE)
    given.set_data_from_numpy(np.array([content], object), binary_data=binary)
    return given


def floats(name, array, binary=True):
    given = triton.InferInput(name, list(array.shape), "FP32")
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def same(result, regions):
    """Whether the outputs of a client are the regions of a predictor."""
    assert np.array_equal(result.as_numpy("masks"), regions.masks)
    boxes = [regions.box(index) for index in range(len(regions))]
    assert result.as_numpy("bboxes").tolist() == boxes
    np.testing.assert_array_equal(result.as_numpy("iou_predictions"), regions.iou_predictions)
    names = [[name for name, _ in row] for row in regions.concepts]
    assert [[text_of(name) for name in row] for row in result.as_numpy("names")] == names
    chances = [[chance for _, chance in row] for row in regions.concepts]
    np.testing.assert_array_equal(result.as_numpy("probabilities"), np.float32(chances))
    assert [text_of(caption) for caption in result.as_numpy("captions")] == regions.captions


def text_of(item):
    """A text that came as binary data, or in JSON."""
    return item if isinstance(item, str) else item.decode()


def test_health_and_metadata(client):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tap")
    assert client.is_model_ready("tap", "1")
    assert not client.is_model_ready("tip") and not client.is_model_ready("tap", "2")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    model = client.get_model_metadata("tap")
    assert [one["name"] for one in model["inputs"]] == ["image", "points", "boxes"]
    assert [one["name"] for one in model["outputs"]] == OUTPUTS


@pytest.mark.parametrize("binary", [True, False])
def test_the_client_gets_what_the_predictor_answers(client, predictor, binary):
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in OUTPUTS]
    result = client.infer(
        "tap",
        [picture_input(binary), floats("boxes", BOXES, binary)],
        outputs=outputs,
        request_id="job 7",
        parameters={"top_k": 3},
    )
    same(result, predictor.predict(PICTURE, boxes=BOXES, top_k=3))
    assert result.get_response()["id"] == "job 7"


def test_all_outputs_without_asking(client, predictor):
    result = client.infer("tap", [picture_input(), floats("points", POINTS)], "1")
    rows = [row[row[:, 2] != 4].tolist() for row in POINTS]
    same(result, predictor.predict(PICTURE, points=rows))


def test_pixels_points_and_boxes(client, predictor):
    pixels = load_image(PICTURE)
    given = triton.InferInput("image", list(pixels.shape), "UINT8")
    given.set_data_from_numpy(pixels)
    inputs = [given, floats("points", POINTS), floats("boxes", BOXES)]
    rows = [row[row[:, 2] != 4].tolist() for row in POINTS]
    same(client.infer("tap", inputs), predictor.predict(pixels, points=rows, boxes=BOXES))


def test_only_what_is_asked_for(client):
    outputs = [triton.InferRequestedOutput("names")]
    result = client.infer("tap", [picture_input(), floats("boxes", BOXES)], outputs=outputs)
    assert [one["name"] for one in result.get_response()["outputs"]] == ["names"]
    assert result.as_numpy("names").ravel().tolist() == [b"rabbit", b"fire extinguisher"]


def test_asynchronous_requests(client, predictor):
    expected = predictor.predict(PICTURE, boxes=BOXES)
    inputs = [picture_input(), floats("boxes", BOXES)]
    asked = [client.async_infer("tap", inputs) for _ in range(4)]
    for one in asked:
        captions = one.get_result().as_numpy("captions")
        assert [text.decode() for text in captions] == expected.captions


@pytest.mark.parametrize(
    ("inputs", "options", "words"),
    [
        (lambda: [floats("boxes", BOXES)], {}, "input image: missing"),
        (lambda: [picture_input()], {}, "no prompt"),
        (lambda: [picture_input(), picture_input()], {}, "expected each of"),
        (lambda: [picture_input(), floats("box", BOXES)], {}, "input 'box'"),
        (lambda: [picture_input(), floats("boxes", BOXES[0])], {}, "shape is [4]"),
        (lambda: [picture_input(), floats("boxes", BOXES + 300)], {}, "outside the picture"),
        (lambda: [picture_input(), floats("points", BOXES)], {}, "input points"),
        (
            lambda: [picture_input(), floats("boxes", BOXES)],
            {"outputs": [triton.InferRequestedOutput("mask")]},
            "output 'mask'",
        ),
        (
            lambda: [picture_input(), floats("boxes", BOXES)],
            {"parameters": {"top_k": 0}},
            "parameters.top_k",
        ),
        (
            lambda: [picture_input(), floats("boxes", BOXES)],
            {"timeout": 10**400},
            "parameters.timeout",
        ),
    ],
)
def test_errors_are_one_line(client, inputs, options, words):
    with pytest.raises(InferenceServerException) as error:
        client.infer("tap", inputs(), **options)
    assert words in error.value.message() and error.value.status() == "422"


def test_a_time_limit_of_the_client(client):
    with pytest.raises(InferenceServerException, match="not done within 1 microseconds"):
        client.infer("tap", [picture_input(), floats("boxes", BOXES)], timeout=1)


def test_an_unknown_model(client):
    with pytest.raises(InferenceServerException, match="Not Found"):
        client.infer("tip", [picture_input(), floats("boxes", BOXES)])


BOX_TENSOR = {"name": "boxes", "shape": [1, 4], "datatype": "FP32", "data": [[80, 120, 160, 240]]}
IMAGE_TENSOR = {
    "name": "image",
    "shape": [1],
    "datatype": "BYTES",
    "data": [base64.b64encode(PICTURE).decode()],
}


def test_nested_json_data(server):
    request = {"inputs": [IMAGE_TENSOR, BOX_TENSOR], "outputs": [{"name": "captions"}]}
    answer = server.ask("POST", "/v2/models/tap/versions/1/infer", request)
    [output] = answer.json()["outputs"]
    assert output == {
        "name": "captions",
        "datatype": "BYTES",
        "shape": [1],
        "data": ["a white rabbit left of a monkey"],
    }


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (IMAGE_TENSOR | {"data": ["%"]}, "expected base64 in JSON"),
        (IMAGE_TENSOR | {"data": [7]}, "expected a list of texts"),
        (IMAGE_TENSOR | {"shape": [2]}, "expected shape [2]"),
        (IMAGE_TENSOR | {"datatype": "TEXT"}, "datatype 'TEXT'"),
        (IMAGE_TENSOR | {"datatype": "UINT8", "shape": [1], "data": [256]}, "expected UINT8"),
        (IMAGE_TENSOR | {"datatype": "UINT8", "shape": [2], "data": [1, [2]]}, "not an array"),
        (IMAGE_TENSOR | {"datatype": "UINT8", "shape": [1], "data": [1.5]}, "expected UINT8"),
        (IMAGE_TENSOR | {"parameters": {"binary_data_size": 9}}, "binary_data_size is 9"),
        (IMAGE_TENSOR | {"parameters": {"binary_data_size": True}}, "binary_data_size is True"),
    ],
)
def test_bad_tensors(server, tensor, words):
    answer = server.ask("POST", "/v2/models/tap/infer", {"inputs": [tensor, BOX_TENSOR]})
    assert answer.status == 422 and words in answer.json()["error"], answer.body


@pytest.mark.parametrize(
    ("size", "tail", "words"),
    [
        (2, b"\x01\0", "ends within a length"),
        (6, b"\x09\0\0\0ab", "ends within an element"),
        (5, b"\x01\0\0\0aXY", "2 bytes of binary data belong to no input"),
    ],
)
def test_bad_binary_data(server, size, tail, words):
    tensor = IMAGE_TENSOR | {"parameters": {"binary_data_size": size}}
    tensor.pop("data")
    header = json.dumps({"inputs": [tensor, BOX_TENSOR]}).encode()
    headers = {"inference-header-content-length": str(len(header))}
    answer = server.ask("POST", "/v2/models/tap/infer", header + tail, headers)
    assert answer.status == 422 and words in answer.json()["error"], answer.body


@pytest.mark.parametrize("length", ["-1", "x", "1" * 5000, "\xb2"])
def test_bad_lengths(server, length):
    headers = {"inference-header-content-length": length}
    answer = server.ask("POST", "/v2/models/tap/infer", b"{}", headers)
    assert answer.status == 422 and "expected a number up to 2" in answer.json()["error"]


def test_masks_that_would_not_fit(server, monkeypatch):
    """A quarter of a million values: as binary data, or in JSON."""
    monkeypatch.setattr("tap_deploy.server.inference_outputs.MAX_MASK_BYTES", 65_535)
    monkeypatch.setattr("tap_deploy.server.inference_outputs.MAX_JSON_MASK_BYTES", 65_534)
    asked = {"inputs": [IMAGE_TENSOR, BOX_TENSOR]}
    for binary, most, remedy in ((True, 65_535, "fewer regions"), (False, 65_534, "binary data")):
        request = asked | {"parameters": {"binary_data_output": binary}}
        error = server.ask("POST", "/v2/models/tap/infer", request).json()["error"]
        assert f"expected at most {most}; ask for {remedy}" in error
    request = asked | {"outputs": [{"name": "bboxes"}]}
    assert server.ask("POST", "/v2/models/tap/infer", request).status == 200


def test_json_of_many_small_values_is_refused(server, monkeypatch):
    monkeypatch.setattr("tap_deploy.server.inference_request.MAX_JSON_BYTES", 1000)
    tensor = BOX_TENSOR | {"data": [[]] * 500}
    answer = server.ask("POST", "/v2/models/tap/infer", {"inputs": [tensor]})
    assert answer.status == 422 and "send large inputs as binary data" in answer.json()["error"]
