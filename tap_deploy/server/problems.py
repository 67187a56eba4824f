"""Errors as HTTP answers: RFC 9457 problems, or ``{"error": …}`` of the Open Inference Protocol."""

from __future__ import annotations

import dataclasses
import http
import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from tap_deploy.errors import InputError, TapError

logger = logging.getLogger(__name__)

PROBLEM_JSON = "application/problem+json"
INFERENCE_PREFIX = "/v2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Why a request was not answered.

    Attributes:
        status: HTTP status.
        detail: one line.
        headers: further headers of the answer.
    """

    status: int
    detail: str
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_dict(self, request_id: str) -> dict[str, Any]:
        """Return the members of an RFC 9457 problem."""
        return {
            "type": "about:blank",
            "title": http.HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "request_id": request_id,
        }

    def response(self, path: str, request_id: str) -> Response:
        """Return the answer to a request for ``path``, in the form of its protocol."""
        inference = path.startswith(INFERENCE_PREFIX)
        content = {"error": self.detail} if inference else self.to_dict(request_id)
        return Response(
            json.dumps(content, ensure_ascii=False),
            status_code=self.status,
            headers=dict(self.headers),
            media_type="application/json" if inference else PROBLEM_JSON,
        )


def problem_of(error: BaseException) -> Problem:
    """Return the problem that an exception means for the client."""
    if isinstance(error, RequestValidationError):
        return Problem(status=422, detail=_first(error))
    if isinstance(error, HTTPException):
        return Problem(
            status=error.status_code, detail=str(error.detail), headers=error.headers or {}
        )
    if isinstance(error, InputError):
        return Problem(status=422, detail=str(error))
    reason = "the backend failed" if isinstance(error, TapError) else "internal error"
    return Problem(status=500, detail=f"{reason}; the log of the server has the details")


async def answer_problem(request: Request, error: Exception) -> Response:
    """Answer a request whose handler has raised; an exception handler of FastAPI."""
    problem = problem_of(error)
    if isinstance(error, TapError) and problem.status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
        fields = {"request_id": request.scope["request_id"]}
        logger.error("%s", error, extra={"fields": fields})  # others are logged by ``Guard``
    if problem.status == http.HTTPStatus.METHOD_NOT_ALLOWED:
        problem = dataclasses.replace(problem, headers={"allow": ", ".join(_methods(request))})
    return problem.response(request.url.path, request.scope["request_id"])


def _methods(request: Request) -> list[str]:
    """Return the methods of all routes to a path; Starlette looks at the first route only."""
    scope = request.scope
    routes = [one for one in request.app.state.routes if one.matches(scope)[0] is not Match.NONE]
    return sorted({method for route in routes for method in route.methods})


def _first(error: RequestValidationError) -> str:
    """Return the first of the problems of a body, in one line."""
    found = error.errors()[0]
    where = ".".join(str(part) for part in found["loc"])
    return " ".join(f"{where}: {found['msg']}".split())
