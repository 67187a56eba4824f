"""The form of the one-shot call: a picture and its prompts, in memory only."""

from __future__ import annotations

import dataclasses

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from tap_deploy.server.options import MAX_JSON_BYTES
from tap_deploy.server.requests import RegionsRequest

PICTURE, PROMPTS = "image", "request"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneShot:
    """The parts of a form.

    Attributes:
        picture: bytes of a file.
        request: prompts, and what to return.
    """

    picture: bytes
    request: RegionsRequest


class _InMemory(MultiPartParser):
    """Starlette's parser, which would write pictures of more than 1 MB to temporary files."""

    spool_max_size = 0  # no limit but that of the whole body


async def one_shot(request: Request) -> OneShot:
    """Read the form of a request.

    Raises:
        HTTPException: it is no form, or has not exactly the two parts.
        RequestValidationError: the JSON is invalid.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise HTTPException(415, f"expected multipart/form-data with {PICTURE} and {PROMPTS}")
    parser = _InMemory(
        request.headers,
        request.stream(),
        max_files=2,
        max_fields=2,
        max_part_size=MAX_JSON_BYTES,
    )
    try:
        form = await parser.parse()
    except MultiPartException as exc:
        raise HTTPException(422, f"the form cannot be read: {exc.message}") from exc
    parts = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            parts[name] = await value.read()
            await value.close()
        else:
            parts[name] = value.encode()
    if len(form.multi_items()) != 2 or parts.keys() != {PICTURE, PROMPTS}:
        raise HTTPException(422, f"expected a form with {PICTURE} and {PROMPTS}, and nothing else")
    return OneShot(picture=parts[PICTURE], request=_parsed(parts[PROMPTS]))


def _parsed(content: bytes) -> RegionsRequest:
    try:
        return RegionsRequest.model_validate_json(content)
    except ValidationError as exc:
        errors = [error | {"loc": (PROMPTS, *error["loc"])} for error in exc.errors()]
        raise RequestValidationError(errors) from exc
