"""A nuclio function for CVAT: an interactor (clicks and a box -> mask) and a detector (masks).

CVAT posts JSON. A request with ``pos_points`` is one of an interactor, any other one of a detector.
Environment: ``TAP_BUNDLE`` (folder), ``TAP_BACKEND`` (onnxruntime), ``TAP_PRECISION`` (fp32).
"""

from __future__ import annotations

import base64
import functools
import json
import os
import pathlib
from typing import Any

import numpy as np
import yaml

from tap_deploy import EncodedImage, PictureFile, Regions, TapError, TapPredictor

DETECTOR = pathlib.Path(__file__).with_name("function-detector.yaml")
THRESHOLD = 0.3  # probability of a name, if CVAT sends none
PICTURES = 8  # kept encoded, so that the next clicks on them take no time
POINTS_PER_SIDE = 16  # of the search without prompts; 32 finds a few more, in four times the time

Json = dict[str, Any]


@functools.cache
def predictor() -> TapPredictor:
    """Return the predictor of this worker."""
    return TapPredictor.from_bundle(
        os.environ["TAP_BUNDLE"],
        os.environ.get("TAP_BACKEND", "onnxruntime"),
        os.environ.get("TAP_PRECISION", "fp32"),
    )


@functools.lru_cache(maxsize=PICTURES)
def encoded(picture: bytes) -> EncodedImage:
    """Return a picture after the image encoder; the same bytes are encoded once."""
    return predictor().encode(PictureFile(source=picture, convert=True))


@functools.cache
def wanted_names() -> frozenset[str]:
    """Return the labels that ``function-detector.yaml`` offers to CVAT."""
    annotations = yaml.safe_load(DETECTOR.read_text("utf-8"))["metadata"]["annotations"]
    return frozenset(label["name"] for label in json.loads(annotations["spec"]))


def init_context(context: Any) -> None:
    """Load the model when a worker starts."""
    predictor()
    context.logger.info("the model is loaded")


def handler(context: Any, event: Any) -> Any:
    """Answer one request of CVAT; the body of the event is its JSON, decoded."""
    request = event.body
    answer: Json | list[Json]
    try:
        picture = picture_of(request)
        answer, status = (interact if "pos_points" in request else detect)(picture, request), 200
    except TapError as exc:  # no picture, a bad one, or prompts that make no region
        context.logger.error(str(exc))
        answer, status = {"error": str(exc)}, 400
    body = json.dumps(answer, separators=(",", ":"))
    return context.Response(
        body=body, headers={}, content_type="application/json", status_code=status
    )


def picture_of(request: Any) -> bytes:
    """Return the picture of a request, the bytes of its file.

    Raises:
        TapError: there is none.
    """
    if not isinstance(request, dict) or not isinstance(request.get("image"), str):
        raise TapError("the request has no image; expected JSON with a picture's file in base64")
    try:
        return base64.b64decode(request["image"], validate=True)
    except ValueError as exc:
        raise TapError(f"image is not in base64 ({exc}); expected a file in base64") from exc


def interact(picture: bytes, request: Json) -> Json:
    """Return the mask of one region, 0 or 1 in rows of the whole picture.

    Args:
        picture: bytes of the file.
        request: see ``prompts_of``.

    Raises:
        TapError: prompts that are none, or make no region.
    """
    points, boxes = prompts_of(request)
    regions = predictor().predict(
        encoded(picture), points=[points], boxes=boxes, captions=False, clip=True
    )
    assert regions.masks is not None
    return {"mask": regions.masks[0].astype(np.uint8).tolist()}


def prompts_of(request: Json) -> tuple[list[list[float]], list[list[float]] | None]:
    """Return the points [x, y, label] of a request, and its box [x0, y0, x1, y1] if there is one.

    Args:
        request: ``pos_points`` and ``neg_points``, lists of [x, y] in pixels, and ``obj_bbox``, two
            opposite corners or None.

    Raises:
        TapError: they are something else.
    """
    try:
        points = [
            [float(x), float(y), label]
            for key, label in (("pos_points", 1), ("neg_points", 0))
            for x, y, *_ in request.get(key) or []
        ]
        corners = np.reshape(np.asarray(request.get("obj_bbox") or [], np.float64), (-1, 2))
    except (TypeError, ValueError) as exc:
        raise TapError(
            f"the prompts cannot be read ({exc}); expected lists of [x, y] in pos_points, "
            "neg_points and obj_bbox"
        ) from exc
    return points, [[*corners.min(axis=0), *corners.max(axis=0)]] if len(corners) else None


def detect(picture: bytes, request: Json) -> list[Json]:
    """Return a shape for everything that has one of the wanted names.

    Args:
        picture: bytes of the file.
        request: ``threshold``, the lowest probability of a name.

    Raises:
        TapError: the threshold is no probability, or the picture is none.
    """
    vocabulary = predictor().vocabulary
    regions = predictor().everything(
        encoded(picture),
        points_per_side=POINTS_PER_SIDE,
        only=sorted(wanted_names()),
        only_thresh=request.get("threshold", THRESHOLD),
        top_k=1 if vocabulary is None else len(vocabulary.names),
    )
    outlines = regions.to_geojson(tolerance=1.0)["features"]
    return [shape(regions, item["id"], item["geometry"]) for item in outlines if item["geometry"]]


def shape(regions: Regions, index: int, outline: Json) -> Json:
    """Return a region as CVAT reads it.

    ``mask`` is the part of the mask in its bounding box, row by row, and then the left, top, right
    and bottom pixel of that box. ``points`` replace it where the user asks for polygons: a polygon
    of CVAT is a single ring, so it is that around the largest part, over its holes.
    """
    mask, box = regions.mask(index), regions.box(index)
    assert mask is not None and box is not None and regions.concepts is not None
    x, y, width, height = box
    part = mask[y : y + height, x : x + width].astype(np.uint8)
    name, probability = next(pair for pair in regions.concepts[index] if pair[0] in wanted_names())
    captions = regions.captions or [""] * len(regions)
    is_one = outline["type"] == "Polygon"
    rings = [rings[0] for rings in ([outline["coordinates"]] if is_one else outline["coordinates"])]
    return {
        "type": "mask",
        "label": name,
        "confidence": f"{probability:.3f}",
        "mask": [*part.ravel().tolist(), x, y, x + width - 1, y + height - 1],
        "points": np.ravel(max(rings, key=ring_area)[:-1]).tolist(),
        "attributes": [{"name": "caption", "value": captions[index]}],
    }


def ring_area(ring: list[list[float]]) -> float:
    """Return the area within a closed ring of [x, y], pixels."""
    x, y = np.transpose(ring)
    return float(abs(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2)
