"""The predictor behind the server: threads that run graphs, for requests that wait together."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tap_deploy.errors import SessionError, TapError
from tap_deploy.pictures.source import PictureFile
from tap_deploy.prediction.inputs import EncodedImage
from tap_deploy.predictor import TapPredictor
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions
from tap_deploy.server.images import ImageStore, embedding_bytes
from tap_deploy.server.metrics import Metrics
from tap_deploy.server.options import ServeOptions
from tap_deploy.server.work import Work, WorkQueue

logger = logging.getLogger(__name__)

ENCODE, DECODE, CAPTION, EVERYTHING = "encode", "decode", "caption", "everything"

OnCaptions = Callable[[list[str]], None]


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """See ``TapPredictor.predict``."""

    max_new_tokens: int | None = None
    temperature: float = 0.0
    seed: int | None = None


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
        self._queue = WorkQueue(max_rows=options.max_batch, max_wait_s=options.max_wait_ms / 1000)
        self._threads: list[threading.Thread] = []

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

    def start(self) -> None:
        """Begin to load the predictor."""
        self._start_thread(self._load)

    def close(self) -> None:
        """Cancel what waits, finish what runs, and free the predictor."""
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
        self.on_ready()

    def _work(self) -> None:
        while (batch := self._queue.take()) is not None:
            try:
                results = batch[0].run(batch)
            except BaseException as exc:  # every caller gets it
                for work in batch:
                    work.future.set_exception(exc)
                continue
            for work, result in zip(batch, results, strict=True):
                work.future.set_result(result)

    async def encode(self, content: bytes | npt.NDArray[np.uint8]) -> EncodedImage:
        """Encode a picture: the bytes of a file, or uint8 [H, W, 3] RGB.

        Raises:
            InputError: it is no picture, or too large.
            SessionError: the backend failed.
        """
        picture = PictureFile(source=content, convert=True, max_pixels=self.options.max_pixels)
        image: EncodedImage = await self._done(
            Work(run=self._encode, key=None, rows=1, values=picture)
        )
        return image

    async def decode(
        self, image: EncodedImage, prompts: Prompts, *, top_k: int, masks: bool
    ) -> Regions:
        """Segment and name regions, without captions.

        Prompts of several requests share a graph call if they are on one picture and are padded to
        the same number of points: padding would change their results.

        Raises:
            InputError: a prompt is invalid.
            SessionError: the backend failed.
        """
        prompts.check(image.frame.width, image.frame.height)  # not with those of other requests
        key = (DECODE, id(image), prompts.coords.shape[1], top_k, masks)
        values = _Decode(image=image, prompts=prompts, top_k=top_k, masks=masks)
        regions: Regions = await self._done(
            Work(run=self._decode, key=key, rows=len(prompts), values=values)
        )
        return regions

    async def caption(
        self, regions: Regions, options: CaptionOptions, on_captions: OnCaptions | None = None
    ) -> Regions:
        """Write captions; the greedy ones of several requests share the graph calls.

        Args:
            regions: from ``decode`` or ``everything``.
            options: of the captions.
            on_captions: called with the texts so far, in another thread.

        Raises:
            SessionError: the backend failed.
        """
        greedy = options.temperature == 0
        key = (CAPTION, options.max_new_tokens) if greedy else None
        values = _Caption(regions=regions, options=options, on_captions=on_captions)
        captioned: Regions = await self._done(
            Work(run=self._caption, key=key, rows=len(regions), values=values)
        )
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
        regions: Regions = await self._done(
            Work(run=self._everything, key=None, rows=1, values=(image, grid))
        )
        return regions

    async def _done(self, work: Work) -> Any:
        self._queue.put(work)
        try:
            return await asyncio.wrap_future(work.future)
        except asyncio.CancelledError:
            work.abandoned.set()
            raise

    def _encode(self, batch: list[Work]) -> list[EncodedImage]:
        with self._timed(ENCODE, batch):
            return [self.predictor.encode(work.values) for work in batch]

    def _decode(self, batch: list[Work]) -> list[Regions]:
        first: _Decode = batch[0].values
        prompts = [work.values.prompts for work in batch]
        together = Prompts(
            coords=np.concatenate([one.coords for one in prompts]),
            labels=np.concatenate([one.labels for one in prompts]),
        )
        with self._timed(DECODE, batch):
            regions = self.predictor.predict(
                first.image,
                prompts=together,
                top_k=first.top_k,
                masks="rle" if first.masks else False,
                captions=False,
            )
        return [regions.take(rows) for rows in _shares(batch)]

    def _caption(self, batch: list[Work]) -> list[Regions]:
        values: list[_Caption] = [work.values for work in batch]
        shares = list(_shares(batch))

        def deal(texts: list[str]) -> None:
            for value, rows in zip(values, shares, strict=True):
                if value.on_captions is not None:
                    value.on_captions([texts[row] for row in rows])

        wanted = any(value.on_captions is not None for value in values)
        with self._timed(CAPTION, batch):
            return self.predictor.caption_many(
                [value.regions for value in values],
                on_captions=deal if wanted else None,
                **dataclasses.asdict(values[0].options),
            )

    def _everything(self, batch: list[Work]) -> list[Regions]:
        with self._timed(EVERYTHING, batch):
            return [self._search(work) for work in batch]

    def _search(self, work: Work) -> Regions:
        image, grid = work.values

        def stop_if_abandoned(stage: str, done: int, total: int) -> None:
            if work.abandoned.is_set():
                raise SessionError("nobody waits for this search any more")

        return self.predictor.everything(
            image, captions=False, on_progress=stop_if_abandoned, **grid
        )

    def _timed(self, stage: str, batch: list[Work]) -> _StageTimer:
        return _StageTimer(self.metrics, stage, batch)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Decode:
    image: EncodedImage
    prompts: Prompts
    top_k: int
    masks: bool


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Caption:
    regions: Regions
    options: CaptionOptions
    on_captions: OnCaptions | None


class _StageTimer:
    """Counts a graph call, its requests and its regions."""

    def __init__(self, metrics: Metrics, stage: str, batch: list[Work]) -> None:
        self._metrics, self._stage, self._batch = metrics, stage, batch

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds, metrics = time.perf_counter() - self._start, self._metrics
        metrics.stage_seconds.labels(self._stage).observe(seconds)
        metrics.batch_requests.labels(self._stage).observe(len(self._batch))
        metrics.batch_regions.labels(self._stage).observe(sum(work.rows for work in self._batch))


def _shares(batch: Sequence[Work]) -> Iterator[range]:
    """Yield the rows of each work in the arrays of the batch."""
    start = 0
    for work in batch:
        yield range(start, start + work.rows)
        start += work.rows
