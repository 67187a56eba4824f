"""Label Studio's prompts to TAP's, and TAP's regions to Label Studio's results.

Environment: ``TAP_BUNDLE`` (folder), ``TAP_BACKEND`` (onnxruntime), ``TAP_PRECISION`` (fp32).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import uuid
from collections.abc import Mapping
from typing import Any

from brush import brush_rle

from tap_deploy import EncodedImage, PictureFile, Regions, TapPredictor

PICTURES = 8  # kept encoded, so that the next clicks on them take no time
POINTS_PER_SIDE = 16  # of the search without prompts; 32 finds a few more, in four times the time

Json = dict[str, Any]


@functools.cache
def predictor() -> TapPredictor:
    """Return the predictor of this process."""
    return TapPredictor.from_bundle(
        os.environ["TAP_BUNDLE"],
        os.environ.get("TAP_BACKEND", "onnxruntime"),
        os.environ.get("TAP_PRECISION", "fp32"),
    )


@functools.lru_cache(maxsize=PICTURES)
def encoded(picture: bytes) -> EncodedImage:
    """Return a picture after the image encoder; the same bytes are encoded once."""
    return predictor().encode(PictureFile(source=picture, convert=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controls:
    """What a labelling configuration asks for.

    Attributes:
        image: name of the ``Image`` tag.
        kind: ``brushlabels`` for masks, ``rectanglelabels`` for boxes.
        shape: name of the tag of that kind.
        caption: name of the ``TextArea`` tag; None without one.
        labels: names of the model -> labels of the tag.
        threshold: lowest probability of a name, 0 to 1; for regions without a prompt.
    """

    image: str
    kind: str
    shape: str
    caption: str | None
    labels: Mapping[str, str]
    threshold: float


def prediction_from_prompts(picture: bytes, context: Json, controls: Controls) -> Json:
    """Return the region that the smart tools ask for: all clicks and a box make one prompt.

    Args:
        picture: bytes of the file.
        context: ``result`` lists clicks and boxes, in percent of the picture.
        controls: what the labelling configuration asks for.
    """
    image = encoded(picture)
    points, box, label = prompt_from_context(context, image.frame.width, image.frame.height)
    if not points and box is None:
        return {"result": [], "score": 0.0}
    regions = predictor().predict(
        image,
        points=[points],
        boxes=None if box is None else [box],
        captions=controls.caption is not None,
        clip=True,
    )
    return _prediction(regions, [label], controls)


def prediction_of_everything(picture: bytes, controls: Controls) -> Json:
    """Return all regions that show something with one of the labels; none without labels."""
    vocabulary = predictor().vocabulary
    if vocabulary is None or not controls.labels:
        return {"result": [], "score": 0.0}
    regions = predictor().everything(
        encoded(picture),
        points_per_side=POINTS_PER_SIDE,
        only=sorted(controls.labels),
        only_thresh=controls.threshold,
        top_k=len(vocabulary.names),
        captions=controls.caption is not None,
    )
    labels = [
        next(controls.labels[name] for name, _ in concepts if name in controls.labels)
        for concepts in regions.concepts or []
    ]
    return _prediction(regions, labels, controls)


def prompt_from_context(
    context: Json, width: int, height: int
) -> tuple[list[list[float]], list[float] | None, str]:
    """Return points [x, y, label], the last box [x0, y0, x1, y1], and the label of the last one.

    Args:
        context: what Label Studio sends.
        width: width of the picture, pixels.
        height: height of the picture, pixels.
    """
    points: list[list[float]] = []
    box, label = None, ""
    for item in context.get("result") or []:
        kind, value = item["type"], item["value"]
        if kind not in ("keypointlabels", "rectanglelabels"):
            continue
        x, y = value["x"] * width / 100, value["y"] * height / 100
        if kind == "keypointlabels":
            points.append([x, y, int(item.get("is_positive", True))])
        else:
            box = [x, y, x + value["width"] * width / 100, y + value["height"] * height / 100]
        label = next(iter(value.get(kind) or [label]))
    return points, box, label


def _prediction(regions: Regions, labels: list[str], controls: Controls) -> Json:
    results = [
        result
        for index, label in enumerate(labels)
        if regions.area(index)
        for result in _results(regions, index, label, controls)
    ]
    scores = [result["score"] for result in results]
    return {"result": results, "score": sum(scores) / max(len(scores), 1)}


def _results(regions: Regions, index: int, label: str, controls: Controls) -> list[Json]:
    """Return the shape of a region and its caption, which belong together by their id."""
    common: Json = {
        "id": uuid.uuid4().hex[:10],
        "to_name": controls.image,
        "original_width": regions.image_width,
        "original_height": regions.image_height,
        "image_rotation": 0,
        "score": float(regions.iou_predictions[index]),
    }
    shape = _mask(regions, index) if controls.kind == "brushlabels" else _box(regions, index)
    value = {**shape, controls.kind: [label]}
    results = [{**common, "from_name": controls.shape, "type": controls.kind, "value": value}]
    if controls.caption is not None and regions.captions is not None:
        value = {"text": [regions.captions[index]]}
        results += [{**common, "from_name": controls.caption, "type": "textarea", "value": value}]
    return results


def _mask(regions: Regions, index: int) -> Json:
    mask = regions.mask(index)
    assert mask is not None
    return {"format": "rle", "rle": brush_rle(mask)}


def _box(regions: Regions, index: int) -> Json:
    x, y, width, height = regions.box(index) or [0, 0, 0, 0]
    across, down = 100 / regions.image_width, 100 / regions.image_height  # percent per pixel
    return {
        "x": x * across,
        "y": y * down,
        "width": width * across,
        "height": height * down,
        "rotation": 0,
    }
