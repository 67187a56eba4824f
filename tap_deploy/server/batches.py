"""The graph calls of requests that share them: what goes in, and how it is dealt out again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tap_deploy.errors import SessionError
from tap_deploy.pictures.source import PictureFile
from tap_deploy.prediction.inputs import EncodedImage
from tap_deploy.predictor import TapPredictor
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions
from tap_deploy.server.work import Work

ENCODE, DECODE, CAPTION, EVERYTHING = "encode", "decode", "caption", "everything"

OnCaptions = Callable[[list[str]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """See ``TapPredictor.predict``."""

    max_new_tokens: int | None = None
    temperature: float = 0.0
    seed: int | None = None


def encode_work(content: bytes | npt.NDArray[np.uint8], max_pixels: int) -> Work:
    """Return the work to encode a picture: bytes of a file, or uint8 [H, W, 3] RGB."""
    picture = PictureFile(source=content, convert=True, max_pixels=max_pixels)
    return Work(stage=ENCODE, run=_encode, key=None, rows=1, values=picture)


def _encode(predictor: TapPredictor, batch: list[Work]) -> list[EncodedImage]:
    return [predictor.encode(work.values) for work in batch]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Decode:
    image: EncodedImage
    prompts: Prompts
    top_k: int
    masks: bool


def decode_work(image: EncodedImage, prompts: Prompts, *, top_k: int, masks: bool) -> Work:
    """Return the work to segment and name regions.

    Prompts of several requests share a call if they are on one picture and are padded to the same
    number of points: padding would change their results.
    """
    return Work(
        stage=DECODE,
        run=_decode,
        key=(DECODE, id(image), prompts.coords.shape[1], top_k, masks),
        rows=len(prompts),
        values=_Decode(image=image, prompts=prompts, top_k=top_k, masks=masks),
    )


def _decode(predictor: TapPredictor, batch: list[Work]) -> list[Regions]:
    first: _Decode = batch[0].values
    prompts = [work.values.prompts for work in batch]
    together = Prompts(
        coords=np.concatenate([one.coords for one in prompts]),
        labels=np.concatenate([one.labels for one in prompts]),
    )
    regions = predictor.predict(
        first.image,
        prompts=together,
        top_k=first.top_k,
        masks="rle" if first.masks else False,
        captions=False,
    )
    return [regions.take(rows) for rows in _shares(batch)]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Caption:
    regions: Regions
    options: CaptionOptions
    on_captions: OnCaptions | None


def caption_work(regions: Regions, options: CaptionOptions, on_captions: OnCaptions | None) -> Work:
    """Return the work to write captions; greedy ones share a call, whatever their pictures."""
    greedy = options.temperature == 0
    return Work(
        stage=CAPTION,
        run=_caption,
        key=(CAPTION, options.max_new_tokens) if greedy else None,
        rows=len(regions),
        values=_Caption(regions=regions, options=options, on_captions=on_captions),
    )


def _caption(predictor: TapPredictor, batch: list[Work]) -> list[Regions]:
    values: list[_Caption] = [work.values for work in batch]
    shares = list(_shares(batch))

    def deal(texts: list[str]) -> None:
        for value, rows in zip(values, shares, strict=True):
            if value.on_captions is not None:
                value.on_captions([texts[row] for row in rows])

    wanted = any(value.on_captions is not None for value in values)
    return predictor.caption_many(
        [value.regions for value in values],
        on_captions=deal if wanted else None,
        **dataclasses.asdict(values[0].options),
    )


def everything_work(image: EncodedImage, grid: dict[str, Any]) -> Work:
    """Return the work to search a picture with these arguments of ``TapPredictor.everything``."""
    return Work(stage=EVERYTHING, run=_everything, key=None, rows=1, values=(image, grid))


def _everything(predictor: TapPredictor, batch: list[Work]) -> list[Regions]:
    return [_search(predictor, work) for work in batch]


def _search(predictor: TapPredictor, work: Work) -> Regions:
    image, grid = work.values

    def stop_if_abandoned(stage: str, done: int, total: int) -> None:
        if work.abandoned.is_set():
            raise SessionError("nobody waits for this search any more")

    return predictor.everything(image, captions=False, on_progress=stop_if_abandoned, **grid)


def _shares(batch: Sequence[Work]) -> Iterator[range]:
    """Yield the rows of each work in the arrays of the batch."""
    start = 0
    for work in batch:
        yield range(start, start + work.rows)
        start += work.rows
