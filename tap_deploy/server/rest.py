"""The routes under ``/v1``: pictures, regions, everything."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from tap_deploy import __version__
from tap_deploy.prediction.inputs import EncodedImage
from tap_deploy.regions import Regions
from tap_deploy.server.answers import (
    ImageAnswer,
    Limits,
    ModelAnswer,
    ProblemAnswer,
    RegionsAnswer,
    regions_answer,
)
from tap_deploy.server.events import events
from tap_deploy.server.examples import (
    EVENTS_EXAMPLE,
    EVERYTHING_EXAMPLES,
    IMAGE_BODY,
    ONE_SHOT_BODY,
    REGIONS_EXAMPLES,
    UPLOADED,
)
from tap_deploy.server.forms import one_shot
from tap_deploy.server.in_thread import in_thread
from tap_deploy.server.options import MAX_POINTS_PER_SIDE, MAX_REGIONS
from tap_deploy.server.problems import PROBLEM_JSON
from tap_deploy.server.requests import AnswerOptions, EverythingRequest, RegionsRequest
from tap_deploy.server.service import service_of

ImageId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="From an upload.")]


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the problems of a route, for its documentation."""
    return {status: {"model": ProblemAnswer, "content": {PROBLEM_JSON: {}}} for status in statuses}


ALWAYS = (401, 403, 422, 503)
WORKING = (*ALWAYS, 400, 408, 413, 415, 429, 500, 504)

router = APIRouter(prefix="/v1", responses=_problems(*ALWAYS))


@router.get("/model", response_model=ModelAnswer)
async def describe_model(request: Request) -> ModelAnswer:
    """Describe the model and the limits of a request."""
    service = service_of(request)
    predictor, options = service.predictor, service.options
    vocabulary = predictor.vocabulary
    return ModelAnswer(
        name=service.model.name,
        version=__version__,
        backend=service.model.backend,
        precision=service.model.precision,
        image_size=predictor.config.image_size,
        concepts=None if vocabulary is None else len(vocabulary.names),
        captions=predictor.tokenizer is not None,
        limits=Limits(
            pixels=options.max_pixels,
            body_bytes=options.max_body_bytes,
            regions=MAX_REGIONS,
            points_per_side=MAX_POINTS_PER_SIDE,
        ),
    )


@router.post(
    "/images",
    status_code=201,
    response_model=ImageAnswer,
    responses=_problems(*WORKING) | UPLOADED,
    openapi_extra=IMAGE_BODY,
)
async def upload(request: Request) -> ImageAnswer:
    """Encode a picture, the bytes of its file, and keep it for prompts.

    The pictures that were used least recently are dropped when memory runs out.
    """
    service = service_of(request)
    image = await service.encode(await request.body())
    return ImageAnswer(
        image_id=service.images.put(image), width=image.frame.width, height=image.frame.height
    )


@router.get("/images/{image_id}", response_model=ImageAnswer, responses=_problems(404))
async def describe_image(request: Request, image_id: ImageId) -> ImageAnswer:
    """Say whether a picture is still kept."""
    frame = _kept(request, image_id).frame
    return ImageAnswer(image_id=image_id, width=frame.width, height=frame.height)


@router.delete("/images/{image_id}", status_code=204, responses=_problems(404))
async def drop(request: Request, image_id: ImageId) -> None:
    """Forget a picture."""
    if not service_of(request).images.drop(image_id):
        raise _forgotten(image_id)


@router.post(
    "/images/{image_id}/regions",
    response_model=RegionsAnswer,
    responses=_problems(404, *WORKING) | EVENTS_EXAMPLE,
    openapi_extra=REGIONS_EXAMPLES,
)
async def find_regions(request: Request, image_id: ImageId, body: RegionsRequest) -> Response:
    """Segment, name and caption regions of a picture."""
    return await _regions(request, _kept(request, image_id), body)


@router.post(
    "/images/{image_id}/everything",
    response_model=RegionsAnswer,
    responses=_problems(404, *WORKING) | EVENTS_EXAMPLE,
    openapi_extra=EVERYTHING_EXAMPLES,
)
async def find_everything(request: Request, image_id: ImageId, body: EverythingRequest) -> Response:
    """Segment, name and caption everything in a picture."""
    service, image = service_of(request), _kept(request, image_id)
    regions = await service.everything(image, body.arguments())
    return await _answer(request, regions, body)


@router.post(
    "/regions",
    response_model=RegionsAnswer,
    responses=_problems(*WORKING) | EVENTS_EXAMPLE,
    openapi_extra=ONE_SHOT_BODY,
)
async def find_regions_once(request: Request) -> Response:
    """Segment, name and caption regions of a picture that is not kept."""
    shot = await one_shot(request)
    image = await service_of(request).encode(shot.picture)
    return await _regions(request, image, shot.request)


async def _regions(request: Request, image: EncodedImage, body: RegionsRequest) -> Response:
    prompts = await in_thread(body.to_prompts, image.frame.width, image.frame.height)
    regions = await service_of(request).decode(
        image, prompts, top_k=body.top_k, masks=body.masks != "none"
    )
    return await _answer(request, regions, body)


async def _answer(request: Request, regions: Regions, options: AnswerOptions) -> Response:
    """Answer with regions, and captions if they are wanted."""
    service = service_of(request)
    if options.stream:
        stream = events(service, regions, options, request.scope)
        return StreamingResponse(stream, media_type="text/event-stream")
    if options.captions:
        regions = await service.caption(regions, options.caption_options)
    content = await in_thread(_json, regions, options)
    return Response(content, media_type="application/json")


def _json(regions: Regions, options: AnswerOptions) -> str:
    return json.dumps(regions_answer(regions, options), ensure_ascii=False, allow_nan=False)


def _kept(request: Request, image_id: str) -> EncodedImage:
    image = service_of(request).images.get(image_id)
    if image is None:
        raise _forgotten(image_id)
    return image


def _forgotten(image_id: str) -> HTTPException:
    return HTTPException(404, f"no picture {image_id}; it was dropped or never there: upload it")
