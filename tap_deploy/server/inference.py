"""The routes under ``/v2``: the Open Inference Protocol, with its binary extension."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tap_deploy import __version__
from tap_deploy.regions import Regions
from tap_deploy.server.examples import TINY_PNG
from tap_deploy.server.guard import LIVE, READY, STARTING
from tap_deploy.server.in_thread import in_thread
from tap_deploy.server.inference_outputs import (
    CAPTIONS,
    NEED_MASKS,
    WantedOutput,
    available_outputs,
    check_room,
    output_array,
)
from tap_deploy.server.inference_request import HEADER_LENGTH, INPUTS, Inference, InferRequest
from tap_deploy.server.service import Service, service_of
from tap_deploy.server.tensors import BINARY_SIZE, TensorSpec, binary_of, json_of

MODEL, VERSION = "tap", "1"
_EXAMPLE = {
    "inputs": [
        {"name": "image", "shape": [1], "datatype": "BYTES", "data": [TINY_PNG]},
        {"name": "boxes", "shape": [1, 4], "datatype": "FP32", "data": [1, 1, 7, 7]},
    ],
    "outputs": [{"name": "names"}, {"name": "captions"}],
}
BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {"$ref": f"#/components/schemas/{InferRequest.__name__}"},
            "example": _EXAMPLE,
        }
    },
}
MODEL_PATH = f"/models/{MODEL}"

BINARY_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "JSON, and after it the binary data of outputs that were asked for so.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


class InferenceError(BaseModel):
    """An error of the Open Inference Protocol."""

    error: str


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": InferenceError} for status in statuses}


router = APIRouter(prefix="/v2", responses=_errors(401, 403))


@router.get(LIVE.removeprefix("/v2"))
async def live() -> dict[str, bool]:
    """Say that the server runs."""
    return {"live": True}


@router.get(READY.removeprefix("/v2"), responses=_errors(503))
async def ready(request: Request) -> dict[str, bool]:
    """Say whether the model has passed its self-test and is loaded."""
    if not service_of(request).ready:
        raise HTTPException(STARTING.status, STARTING.detail, dict(STARTING.headers))
    return {"ready": True}


@router.get("")
async def server_metadata() -> dict[str, Any]:
    """Describe the server."""
    return {"name": "tap_deploy", "version": __version__, "extensions": ["binary_tensor_data"]}


async def model_metadata(request: Request) -> dict[str, Any]:
    """Describe the inputs and outputs of the model."""
    return {
        "name": MODEL,
        "versions": [VERSION],
        "platform": "tap_deploy",
        "inputs": [spec.to_dict() for spec in INPUTS],
        "outputs": [spec.to_dict() for spec in _available(service_of(request))],
    }


async def model_ready() -> dict[str, Any]:
    """Say that the model is loaded."""
    return {"name": MODEL, "ready": True}


async def infer(request: Request) -> Response:
    """Segment, name and caption regions of a picture."""
    service = service_of(request)
    length = request.headers.get(HEADER_LENGTH)
    inference = await in_thread(Inference.from_body, await request.body(), length)
    wanted = inference.request.wanted(_available(service))
    microseconds = inference.request.parameters.timeout
    try:
        regions = await asyncio.wait_for(
            _regions(service, inference, wanted),
            None if microseconds is None else microseconds / 1e6,
        )
    except asyncio.TimeoutError as exc:
        raise HTTPException(504, f"not done within {microseconds} microseconds") from exc
    return await in_thread(_answer, regions, inference.request.id, wanted)


for path in (MODEL_PATH, f"{MODEL_PATH}/versions/{VERSION}"):
    shown = path == MODEL_PATH
    answers = _errors(400, 408, 413, 415, 422, 429, 500, 503, 504) | BINARY_ANSWER
    router.get(path, responses=_errors(503), include_in_schema=shown)(model_metadata)
    router.get(f"{path}/ready", responses=_errors(503), include_in_schema=shown)(model_ready)
    router.post(f"{path}/infer", responses=answers, include_in_schema=shown)(infer)


async def _regions(service: Service, inference: Inference, wanted: list[WantedOutput]) -> Regions:
    parameters, prompts = inference.request.parameters, inference.prompts
    names = {output.spec.name for output in wanted}
    image = await service.encode(inference.picture)
    width, height = image.frame.width, image.frame.height
    check_room(prompts, width, height, wanted)
    if parameters.clip:
        prompts = prompts.clip(width, height)[0]
    needs_masks = not names.isdisjoint(NEED_MASKS)
    regions = await service.decode(image, prompts, top_k=parameters.top_k, masks=needs_masks)
    if CAPTIONS not in names:
        return regions
    return await service.caption(regions, inference.request.caption_options)


def _available(service: Service) -> list[TensorSpec]:
    predictor = service.predictor
    return available_outputs(
        names=predictor.vocabulary is not None, captions=predictor.tokenizer is not None
    )


def _answer(regions: Regions, request_id: str, wanted: list[WantedOutput]) -> Response:
    """Return the JSON of an answer, and its binary data after it."""
    outputs, contents = [], []
    for output in wanted:
        array = output_array(output.spec.name, regions)
        described = {**output.spec.to_dict(), "shape": list(array.shape)}
        if output.binary:
            contents.append(binary_of(array, output.spec.datatype))
            described["parameters"] = {BINARY_SIZE: len(contents[-1])}
        else:
            described["data"] = json_of(array, output.spec.datatype)
        outputs.append(described)
    answer = {"model_name": MODEL, "model_version": VERSION, "outputs": outputs}
    if request_id:
        answer["id"] = request_id
    text = json.dumps(answer, allow_nan=False).encode()
    if not contents:
        return Response(text, media_type="application/json")
    return Response(
        b"".join([text, *contents]),
        media_type="application/octet-stream",
        headers={HEADER_LENGTH: str(len(text))},
    )
