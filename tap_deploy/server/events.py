"""Server-sent events: regions first, then their captions while they are written."""

from __future__ import annotations

import asyncio
import http
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import Scope

from tap_deploy.regions import Regions
from tap_deploy.server.answers import regions_answer
from tap_deploy.server.exchange import DEADLINE
from tap_deploy.server.in_thread import in_thread
from tap_deploy.server.problems import problem_of
from tap_deploy.server.requests import AnswerOptions
from tap_deploy.server.service import Service

logger = logging.getLogger(__name__)

REGIONS, CAPTIONS, DONE, ERROR = "regions", "captions", "done", "error"


async def events(
    service: Service, regions: Regions, options: AnswerOptions, scope: Scope
) -> AsyncIterator[bytes]:
    """Yield the events of a request.

    Args:
        service: writes the captions.
        regions: found so far, without captions.
        options: of the answer.
        scope: of the request, with its id and deadline.
    """
    try:
        yield _event(REGIONS, await in_thread(_uncaptioned, regions, options))
        captions: list[str] | None = None
        if options.captions and service.predictor.tokenizer is not None:
            writing = _Writing(len(regions), scope[DEADLINE])
            async for changed in writing.changes(
                service.caption(regions, options.caption_options, writing.note)
            ):
                yield _event(CAPTIONS, {"captions": changed})
            captions = writing.texts
        yield _event(DONE, {"captions": captions})
    except Exception as exc:
        problem = problem_of(exc)
        if problem.status == http.HTTPStatus.INTERNAL_SERVER_ERROR:
            fields = {"request_id": scope["request_id"]}
            logger.error("a stream ended", exc_info=exc, extra={"fields": fields})
        yield _event(ERROR, problem.to_dict(scope["request_id"]))


def _uncaptioned(regions: Regions, options: AnswerOptions) -> dict[str, Any]:
    answer = regions_answer(regions, options)
    for region in answer["regions"]:
        region["caption"] = region["caption_ids"] = None
    return answer


class _Writing:
    """The texts of a request, as far as they are written.

    Attributes:
        texts: of each region.
    """

    def __init__(self, count: int, deadline: float) -> None:
        self.texts, self._deadline = [""] * count, deadline
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[list[str] | None] = asyncio.Queue()

    def note(self, texts: list[str]) -> None:
        """Take the texts so far, from any thread."""
        self._loop.call_soon_threadsafe(self._news.put_nowait, texts)

    async def changes(self, caption: Awaitable[Regions]) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield the regions whose texts have changed, until all are written.

        Raises:
            HTTPException: the deadline has passed.
        """
        task = asyncio.ensure_future(caption)
        task.add_done_callback(lambda _: self._news.put_nowait(None))
        try:
            while (texts := await self._next()) is not None:
                if changed := self._take(texts):
                    yield changed
            captions = (await task).captions
            assert captions is not None
            if changed := self._take(captions):
                yield changed
        finally:
            task.cancel()

    async def _next(self) -> list[str] | None:
        try:
            return await asyncio.wait_for(self._news.get(), self._deadline - time.monotonic())
        except asyncio.TimeoutError as exc:
            late = http.HTTPStatus.GATEWAY_TIMEOUT
            raise HTTPException(late, "the captions are not done in time; ask for less") from exc

    def _take(self, texts: list[str]) -> list[dict[str, Any]]:
        changed = [
            {"index": index, "caption": text}
            for index, (old, text) in enumerate(zip(self.texts, texts, strict=True))
            if text != old
        ]
        self.texts = texts
        return changed


def _event(name: str, data: Any) -> bytes:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    return f"event: {name}\ndata: {text}\n\n".encode()
