"""The ASGI application: routes, their OpenAPI description, and what guards them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from tap_deploy import __version__
from tap_deploy.errors import TapError
from tap_deploy.server import inference, pages, rest
from tap_deploy.server.guard import Guard
from tap_deploy.server.inference_request import InferRequest
from tap_deploy.server.problems import answer_problem
from tap_deploy.server.requests import RegionsRequest
from tap_deploy.server.service import Service

_SCHEMAS = "#/components/schemas/{model}"
_DESCRIPTION = (
    "Points, boxes and sketches on a picture become masks, names and captions. Coordinates are "
    "pixels of the upright picture, x before y."
)


def build_app(service: Service) -> ASGIApp:
    """Return the application that answers for a service."""
    app = FastAPI(
        title="tap_deploy",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,  # pages that load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # to an address made of the header Host, and without TLS
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.service = service
    routers = (rest.router, inference.router, pages.router)
    app.state.routes = [route for router in routers for route in router.routes]
    for router in routers:
        app.include_router(router)
    for kind in (RequestValidationError, HTTPException, TapError, Exception):
        app.add_exception_handler(kind, answer_problem)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # FastAPI's own way
    return Guard(app, service)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI description, with the bodies that FastAPI does not parse itself."""
    if app.openapi_schema is None:
        described = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            separate_input_output_schemas=False,
        )
        components = described["components"]
        models = [(RegionsRequest, "validation"), (InferRequest, "validation")]
        _, schemas = models_json_schema(models, ref_template=_SCHEMAS)  # type: ignore[arg-type]
        components["schemas"] |= schemas["$defs"]
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"token": []}, {}]
        infer = described["paths"][f"/v2{inference.MODEL_PATH}/infer"]["post"]
        infer["requestBody"] = inference.BODY
        app.openapi_schema = described
    return app.openapi_schema
