"""The predictor behind the server: threads that run graphs, for requests that wait together."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from starlette.requests import Request

from tap_deploy.errors import TapError
from tap_deploy.prediction.inputs import EncodedImage
from tap_deploy.predictor import TapPredictor
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions
from tap_deploy.server.batches import (
    CaptionOptions,
    OnCaptions,
    caption_work,
    decode_work,
    encode_work,
    everything_work,
)
from tap_deploy.server.images import ImageStore, embedding_bytes
from tap_deploy.server.metrics import Metrics
from tap_deploy.server.options import ServeOptions
from tap_deploy.server.work import Work, WorkQueue

logger = logging.getLogger(__name__)


class _NotWanted(Exception):
    """The server ends while the predictor is loaded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What clients are told about the model.

    Attributes:
        name: name of the bundle.
        backend: what runs the graphs.
        precision: of the graphs.
    """

    name: str
    backend: str
    precision: str


class Service:
    """Loads a predictor in the background, and runs its graphs in a few threads.

    Args:
        open_predictor: tests the bundle and loads it.
        model: what clients are told about it.
        options: of the server.
    """

    def __init__(
        self, open_predictor: Callable[[], TapPredictor], model: ServedModel, options: ServeOptions
    ) -> None:
        self.model, self.options, self.metrics = model, options, Metrics()
        self.error: TapError | None = None
        self.stop_serving: Callable[[], None] = lambda: None
        self.on_ready: Callable[[], None] = lambda: None
        self._open = open_predictor
        self._predictor: TapPredictor | None = None
        self._images: ImageStore | None = None
        self.pending = 0  # requests that are being answered
        self.metrics.pending.set_function(lambda: self.pending)
        self._queue = WorkQueue(
            max_rows=options.max_batch,
            max_wait_s=options.max_wait_ms / 1000,
            pending=lambda: self.pending,
        )
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()

    @property
    def ready(self) -> bool:
        """Whether the bundle has passed its self-test and is loaded."""
        return self._predictor is not None

    @property
    def predictor(self) -> TapPredictor:
        """The loaded predictor; only when ``ready``."""
        assert self._predictor is not None
        return self._predictor

    @property
    def images(self) -> ImageStore:
        """The encoded pictures; only when ``ready``."""
        assert self._images is not None
        return self._images

    def require_wanted(self) -> None:
        """Let a predictor be loaded in steps: raise if nobody wants it any more."""
        if self._closing.is_set():
            raise _NotWanted

    def start(self) -> None:
        """Begin to load the predictor."""
        self._start_thread(self._load)

    def close(self) -> None:
        """Cancel what waits, finish what runs, and free the predictor."""
        self._closing.set()
        self._queue.close()
        for thread in self._threads:
            thread.join()
        if self._predictor is not None:
            self._predictor.close()
            self._predictor = None

    def _start_thread(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=f"tap-{target.__name__.strip('_')}")
        self._threads.append(thread)
        thread.start()

    def _load(self) -> None:
        try:
            predictor = self._open()
        except _NotWanted:
            return
        except TapError as exc:
            self.error = exc
            self.stop_serving()
            return
        except BaseException as exc:
            self.error = TapError(f"the bundle cannot be loaded: {exc!r}")
            self.stop_serving()
            raise
        self._images = ImageStore(embedding_bytes(predictor.config), self.options.cache_bytes)
        self.metrics.images.set_function(lambda: len(self.images))
        self._predictor = predictor
        for _ in range(self.options.workers):
            self._start_thread(self._work)
        self.metrics.ready.set(1)
        if not self._closing.is_set():
            self.on_ready()

    def _work(self) -> None:
        while (batch := self._queue.take()) is not None:
            try:
                results = self._run(batch)
            except BaseException as exc:  # every caller gets it
                for work in batch:
                    work.future.set_exception(exc)
                continue
            for work, result in zip(batch, results, strict=True):
                work.future.set_result(result)

    def _run(self, batch: list[Work]) -> list[Any]:
        stage, rows = batch[0].stage, sum(work.rows for work in batch)
        with self.metrics.graph_call(stage, requests=len(batch), regions=rows):
            return batch[0].run(self.predictor, batch)

    async def encode(self, content: bytes | npt.NDArray[np.uint8]) -> EncodedImage:
        """Encode a picture: the bytes of a file, or uint8 [H, W, 3] RGB.

        Raises:
            InputError: it is no picture, or too large.
            SessionError: the backend failed.
        """
        image: EncodedImage = await self._done(encode_work(content, self.options.max_pixels))
        return image

    async def decode(
        self, image: EncodedImage, prompts: Prompts, *, top_k: int, masks: bool
    ) -> Regions:
        """Segment and name regions, without captions.

        Raises:
            InputError: a prompt is invalid.
            SessionError: the backend failed.
        """
        prompts.check(image.frame.width, image.frame.height)  # not with those of other requests
        regions: Regions = await self._done(decode_work(image, prompts, top_k=top_k, masks=masks))
        return regions

    async def caption(
        self, regions: Regions, options: CaptionOptions, on_captions: OnCaptions | None = None
    ) -> Regions:
        """Write captions.

        Args:
            regions: from ``decode`` or ``everything``.
            options: of the captions.
            on_captions: called with the texts so far, in another thread.

        Raises:
            SessionError: the backend failed.
        """
        captioned: Regions = await self._done(caption_work(regions, options, on_captions))
        return captioned

    async def everything(self, image: EncodedImage, grid: dict[str, Any]) -> Regions:
        """Segment and name everything, without captions.

        Args:
            image: an encoded picture.
            grid: arguments of ``TapPredictor.everything``.

        Raises:
            InputError: invalid argument.
            SessionError: the backend failed.
        """
        regions: Regions = await self._done(everything_work(image, grid))
        return regions

    async def _done(self, work: Work) -> Any:
        self._queue.put(work)
        try:
            return await asyncio.wrap_future(work.future)
        except asyncio.CancelledError:
            work.abandoned.set()
            self._queue.discard(work)
            raise


def service_of(request: Request) -> Service:
    """Return the service behind a request."""
    service: Service = request.app.state.service
    return service
