"""The page, and what describes the server: metrics, OpenAPI."""

from __future__ import annotations

import functools
import importlib.resources

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tap_deploy.server.service import service_of

INDEX = "index.html"
_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def index() -> Response:
    """Return the page."""
    return _file(INDEX)


@router.get("/page/{name}")
async def page_file(name: str) -> Response:
    """Return a file of the page."""
    return _file(name)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return the counters of the server in Prometheus' text format."""
    return Response(service_of(request).metrics.text(), media_type="text/plain; version=0.0.4")


def _file(name: str) -> Response:
    files = page_files()
    if name not in files:
        raise HTTPException(404, "there is no such page")
    suffix = name[name.rindex(".") :]
    return Response(files[name], media_type=_TYPES[suffix])


@functools.cache
def page_files() -> dict[str, bytes]:
    """Return the files of the page by name; no other file can be asked for."""
    folder = importlib.resources.files("tap_deploy.server") / "page"
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.name.endswith(tuple(_TYPES))
    }
