"""The OpenAPI description of bodies that FastAPI does not parse itself, and examples."""

from __future__ import annotations

from typing import Any

from tap_deploy.server.requests import RegionsRequest

PICTURE_TYPES = (
    "image/jpeg",
    "image/png",
    "image/webp",
    "image/tiff",
    "image/bmp",
    "image/gif",
    "application/octet-stream",
)

# A PNG of 8 x 8 pixels of one colour, in base64.
TINY_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR42mM8"
    "UaHBgA0wMeAAg1MCAB4nAXgllso1AAAAAElFTkSuQmCC"
)

_PICTURE: dict[str, Any] = {"type": "string", "format": "binary", "minLength": 1}

IMAGE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The bytes of a picture's file; its type is read from the bytes.",
        "content": {name: {"schema": _PICTURE} for name in PICTURE_TYPES},
    }
}

_PROMPTS = {
    "a point": {"prompts": [{"points": [[120, 223, 1]]}]},
    "a point inside, one outside": {"prompts": [{"points": [[120, 223, 1], [60, 40, 0]]}]},
    "two boxes, PNG masks, five names": {
        "prompts": [{"box": [80, 120, 160, 240]}, {"box": [10, 10, 90, 80]}],
        "masks": "png",
        "top_k": 5,
    },
    "a sketch, captions while they are written": {
        "prompts": [{"sketch": [[30, 40], [60, 80], [90, 85]]}],
        "stream": True,
    },
}
_EVERYTHING = {
    "all": {},
    "only dogs and cats, polygons, no captions": {
        "only": ["dog", "cat"],
        "masks": "polygons",
        "captions": False,
    },
}


def _json_examples(examples: dict[str, Any]) -> dict[str, Any]:
    named = {name: {"summary": name, "value": value} for name, value in examples.items()}
    return {"requestBody": {"content": {"application/json": {"examples": named}}}}


REGIONS_EXAMPLES = _json_examples(_PROMPTS)
EVERYTHING_EXAMPLES = _json_examples(_EVERYTHING)

# The JSON of a form field is text; OpenAPI describes its content by ``encoding``.
ONE_SHOT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image", "request"],
                    "additionalProperties": False,
                    "properties": {
                        "image": _PICTURE,
                        "request": {"$ref": f"#/components/schemas/{RegionsRequest.__name__}"},
                    },
                },
                "encoding": {"request": {"contentType": "application/json"}},
                "example": {"request": {"prompts": [{"points": [[120, 223, 1]]}]}},
            }
        },
    }
}

_STREAM = """\
event: regions
data: {"image": {"height": 256, "width": 256}, "regions": [{"index": 0, "caption": null}]}

event: captions
data: {"captions": [{"index": 0, "caption": "a white"}]}

event: captions
data: {"captions": [{"index": 0, "caption": "a white rabbit"}]}

event: done
data: {"captions": ["a white rabbit"]}

"""
_IMAGE_ID = {"image_id": "$response.body#/image_id"}
UPLOADED: dict[int | str, dict[str, Any]] = {
    201: {
        "description": "The picture is kept; its id is for these operations.",
        "links": {
            name: {"operationId": name, "parameters": _IMAGE_ID}
            for name in ("describe_image", "drop", "find_regions", "find_everything")
        },
    }
}
EVENTS_EXAMPLE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The regions; with stream, events: regions, captions, done or error.",
        "content": {
            "text/event-stream": {"example": _STREAM},  # OpenAPI 3.1 has no schema of events
        },
    }
}
