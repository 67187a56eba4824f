"""The REST routes of the server answer what the predictor answers."""

from __future__ import annotations

import base64
import io
import itertools
import json
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.demo_model import DemoModel
from tap_deploy.predictor import TapPredictor
from tap_deploy.prompts import Prompts
from tests.served import Served, events_of, multipart, served

PICTURE = (DemoModel().samples / "1.png").read_bytes()
POINT = {"points": [[120, 223, 1]]}
BOX = {"box": [211, 96, 239, 156]}
SKETCH = {"sketch": [[186, 182], [178, 199], [171, 217], [160, 244]]}


@pytest.fixture(scope="module")
def predictor(demo_bundle: Bundle) -> Iterator[TapPredictor]:
    with TapPredictor.from_bundle(demo_bundle.path) as predictor:
        yield predictor


@pytest.fixture(scope="module")
def server(demo_bundle: Bundle) -> Iterator[Served]:
    with served(lambda: TapPredictor.from_bundle(demo_bundle.path)) as running:
        yield running


@pytest.fixture(scope="module")
def image_id(server: Served) -> str:
    return server.upload(PICTURE)


def regions_of(server, image_id, *prompts, **options):
    answer = server.ask("POST", f"/v1/images/{image_id}/regions", {"prompts": prompts, **options})
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def test_the_model(server, predictor):
    answer = server.ask("GET", "/v1/model").json()
    assert answer["name"] == "tap_demo" and answer["captions"] is True
    assert answer["concepts"] == len(predictor.vocabulary)
    assert answer["limits"]["pixels"] == server.service.options.max_pixels


def test_each_prompt_is_answered_as_by_the_predictor(server, image_id, predictor):
    for prompt, prompts in (
        (POINT, Prompts.from_points([POINT["points"]])),
        (BOX, Prompts.from_boxes([BOX["box"]])),
        (SKETCH, Prompts.from_sketches([SKETCH["sketch"]])),
        (BOX | POINT, Prompts.from_points_and_boxes([POINT["points"]], [BOX["box"]])),
    ):
        expected = predictor.predict(PICTURE, prompts=prompts, masks="rle").to_dict()
        assert regions_of(server, image_id, prompt) == expected


def test_several_prompts_of_one_request(server, image_id, predictor):
    prompts = Prompts.concatenate(
        [
            Prompts.from_points([POINT["points"]]),
            Prompts.from_boxes([BOX["box"]]),
            Prompts.from_sketches([SKETCH["sketch"]]),
        ]
    )
    expected = predictor.predict(PICTURE, prompts=prompts, masks="rle", top_k=3).to_dict()
    answer = regions_of(server, image_id, POINT, BOX, SKETCH, top_k=3)
    assert answer == expected
    names = [region["concepts"][0]["name"] for region in answer["regions"]]
    assert names == ["rabbit", "fire extinguisher", "monkey"]


def test_forms_of_masks(server, image_id, predictor):
    [mask] = predictor.predict(PICTURE, points=[POINT["points"]]).masks
    [region] = regions_of(server, image_id, POINT, masks="png")["regions"]
    with Image.open(io.BytesIO(base64.b64decode(region["mask_png"]))) as picture:
        assert np.array_equal(np.asarray(picture), mask)
    assert region["segmentation"] is None and region["area"] == mask.sum()
    [region] = regions_of(server, image_id, POINT, masks="polygons")["regions"]
    expected = predictor.predict(PICTURE, points=[POINT["points"]]).to_polygons(1.0)
    assert region["segmentation"] == expected[0] and "mask_png" not in region
    [region] = regions_of(server, image_id, POINT, masks="none")["regions"]
    assert region["segmentation"] is region["bbox"] is region["area"] is None
    assert region["concepts"][0]["name"] == "rabbit"


def test_captions_can_be_left_out_cut_and_drawn(server, image_id, predictor):
    [region] = regions_of(server, image_id, POINT, captions=False)["regions"]
    assert region["caption"] is None
    [region] = regions_of(server, image_id, POINT, max_new_tokens=2)["regions"]
    assert region["caption"] == "a white"
    drawn = {"temperature": 5.0, "seed": 3}
    [region] = regions_of(server, image_id, POINT, **drawn)["regions"]
    expected = predictor.predict(PICTURE, points=[POINT["points"]], **drawn)
    assert [region["caption"]] == expected.captions


def test_prompts_outside_can_be_clipped(server, image_id, predictor):
    outside = {"box": [211, 96, 300, 300]}
    path = f"/v1/images/{image_id}/regions"
    answer = server.ask("POST", path, {"prompts": [outside]})
    assert answer.status == 422 and "lies outside the picture" in answer.detail
    expected = predictor.predict(PICTURE, boxes=[outside["box"]], clip=True, masks="rle")
    assert regions_of(server, image_id, outside, clip=True) == expected.to_dict()


def test_everything(server, image_id, predictor):
    options = {"points_per_side": 8, "only": ["rabbit", "monkey"], "only_thresh": 0.5}
    expected = predictor.everything(PICTURE, **options).to_dict()
    path = f"/v1/images/{image_id}/everything"
    assert server.ask("POST", path, options).json() == expected
    assert len(expected["regions"]) >= 2
    streamed = events_of(server.ask("POST", path, {**options, "stream": True}).body)
    captions = [region["caption"] for region in expected["regions"]]
    assert streamed[-1] == ("done", {"captions": captions})
    answer = server.ask("POST", path, {"only": ["rabit"]})
    assert answer.status == 422 and "'rabit'" in answer.detail


def test_one_call_with_picture_and_prompts(server, predictor):
    kept = len(server.service.images)
    body, headers = multipart(PICTURE, json.dumps({"prompts": [BOX]}))
    expected = predictor.predict(PICTURE, boxes=[BOX["box"]], masks="rle").to_dict()
    assert server.ask("POST", "/v1/regions", body, headers).json() == expected
    assert len(server.service.images) == kept


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        (*multipart(PICTURE, "{"), 422, "request: Invalid JSON"),
        (*multipart(PICTURE, '{"prompts": []}'), 422, "request.prompts: List should have"),
        (*multipart(b"no picture", json.dumps({"prompts": [BOX]})), 422, "not a picture"),
        (PICTURE, {"content-type": "image/png"}, 415, "multipart/form-data"),
        (b"--x\r\n", {"content-type": "multipart/form-data; boundary=y"}, 422, "cannot be read"),
        (b"", {"content-type": "multipart/form-data"}, 422, "boundary"),
    ],
)
def test_bad_forms(server, body, headers, status, words):
    answer = server.ask("POST", "/v1/regions", body, headers)
    assert (answer.status, words in answer.detail) == (status, True), answer.body


def test_captions_are_streamed_token_by_token(server, image_id):
    prompts = {"prompts": [POINT, BOX], "stream": True}
    answer = server.ask("POST", f"/v1/images/{image_id}/regions", prompts)
    assert answer.headers["content-type"].startswith("text/event-stream")
    names, data = zip(*events_of(answer.body), strict=True)
    assert names[0] == "regions" and set(names[1:-1]) == {"captions"} and names[-1] == "done"
    whole = regions_of(server, image_id, POINT, BOX)
    for region in whole["regions"]:
        texts = [
            change["caption"]
            for event in data[1:-1]
            for change in event["captions"]
            if change["index"] == region["index"]
        ]
        assert len(texts) >= 5
        assert all(long.startswith(short) for short, long in itertools.pairwise(texts))
        assert texts[-1] == region["caption"]
        region["caption"] = region["caption_ids"] = None
    assert data[0] == whole
    assert data[-1]["captions"] == ["a white rabbit left of a monkey", texts[-1]]


def test_a_picture_can_be_looked_up_and_forgotten(server):
    image_id = server.upload(PICTURE)
    path = f"/v1/images/{image_id}"
    found = server.ask("GET", path).json()
    assert found == {"image_id": image_id, "width": 256, "height": 256}
    assert server.ask("DELETE", path).status == 204
    for method, end, body in (
        ("GET", "", None),
        ("DELETE", "", None),
        ("POST", "/regions", {"prompts": [POINT]}),
        ("POST", "/everything", {}),
    ):
        answer = server.ask(method, path + end, body)
        assert answer.status == 404 and "upload it" in answer.detail


def test_pictures_are_turned_upright_and_converted(server):
    content = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    Image.new("L", (40, 20)).save(content, "JPEG", exif=exif)
    answer = server.ask("POST", "/v1/images", content.getvalue()).json()
    assert (answer["width"], answer["height"]) == (20, 40)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ({}, "expected points, a box, both, or a sketch alone"),
        (SKETCH | BOX, "expected points, a box, both, or a sketch alone"),
        ({"points": [[1, 2, 7]]}, "label 7"),
        ({"points": [[1, 2, 0.5]]}, "label 0.5"),
        ({"box": [9, 9, 9, 12]}, "has no area"),
        ({"points": [[1, 2]]}, "prompts.0.points.0: List should have at least 3 items"),
        ({"points": [["1", 2, 1]]}, "prompts.0.points.0.0: Input should be a valid number"),
        ({"path": "/etc/passwd"}, "prompts.0.path: Extra inputs are not permitted"),
    ],
)
def test_bad_prompts(server, image_id, prompt, words):
    answer = server.ask("POST", f"/v1/images/{image_id}/regions", {"prompts": [prompt]})
    assert answer.status == 422 and words in answer.detail, answer.body


@pytest.mark.parametrize("body", [b"", b"no picture", PICTURE[:100]])
def test_bad_pictures(server, body):
    answer = server.ask("POST", "/v1/images", body)
    assert answer.status == 422 and "image from bytes" in answer.detail


def test_a_picture_of_too_many_pixels_is_not_decoded(demo_bundle):
    content = io.BytesIO()
    Image.new("RGB", (200, 200)).save(content, "PNG")
    with served(lambda: TapPredictor.from_bundle(demo_bundle.path), max_pixels=39_999) as server:
        answer = server.ask("POST", "/v1/images", content.getvalue())
        assert answer.status == 422 and "expected at most 39999" in answer.detail


def test_the_least_recently_used_picture_is_dropped(demo_bundle):
    def open_predictor():
        return TapPredictor.from_bundle(demo_bundle.path)

    with served(open_predictor, cache_bytes=1 << 20) as server:
        most = server.service.images.capacity
        ids = [server.upload(PICTURE) for _ in range(most)]
        assert server.ask("GET", f"/v1/images/{ids[0]}").status == 200  # now the newest
        new = server.upload(PICTURE)
        statuses = [server.ask("GET", f"/v1/images/{one}").status for one in (*ids, new)]
        assert statuses == [200, 404] + [200] * (most - 1)
        assert len(server.service.images) == most


def test_concurrent_requests_share_graph_calls_and_change_no_answer(demo_bundle, predictor):
    """Prompts of different kinds, on different pictures, at the same time."""
    pictures = [path.read_bytes() for path in sorted(DemoModel().samples.glob("*.png"))[:2]]
    prompts = [POINT, BOX, SKETCH, {"points": [[60, 60, 1]]}]
    expected = {
        (number, json.dumps(prompt)): predictor.predict(
            picture, prompts=one_prompt(prompt), masks="rle"
        ).to_dict()
        for number, picture in enumerate(pictures)
        for prompt in prompts
    }
    found = []

    def click(server, number, image_id, prompt):
        answer = server.ask("POST", f"/v1/images/{image_id}/regions", {"prompts": [prompt]})
        found.append((number, json.dumps(prompt), answer.json()))

    def open_predictor():
        return TapPredictor.from_bundle(demo_bundle.path)

    with served(open_predictor, max_wait_ms=200, workers=1) as server:
        threads = [
            threading.Thread(target=click, args=(server, number, image_id, prompt))
            for number, image_id in enumerate(map(server.upload, pictures))
            for prompt in prompts
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        metrics = server.ask("GET", "/metrics").body.decode()
    assert len(found) == 24
    for number, prompt, answer in found:
        assert same(answer, expected[number, prompt])
    for stage in ("decode", "caption"):
        [calls] = [
            float(line.split()[1])
            for line in metrics.splitlines()
            if line.startswith(f'tap_batch_requests_count{{stage="{stage}"}}')
        ]
        assert calls <= 12, stage  # 24 without sharing


def same(answer, expected):
    """Whether masks, names and captions are equal; the rest of a batch may round scores."""
    [one], [other] = answer["regions"], expected["regions"]
    scores = (one["iou_prediction"], one["concepts"][0].pop("probability"))
    others = (other["iou_prediction"], other["concepts"][0].get("probability"))
    assert scores == pytest.approx(others, abs=1e-5)
    concepts = [{"name": other["concepts"][0]["name"]}]
    return one == other | {"iou_prediction": one["iou_prediction"], "concepts": concepts}


def one_prompt(prompt):
    if "sketch" in prompt:
        return Prompts.from_sketches([prompt["sketch"]])
    if "box" in prompt:
        return Prompts.from_boxes([prompt["box"]])
    return Prompts.from_points([prompt["points"]])
