"""Graph calls of a prediction, in chunks that fit in memory, and conversion to ``Regions``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from tap_deploy.chunks import captions_per_call, prompts_per_call
from tap_deploy.config import TapConfig
from tap_deploy.image import Frame
from tap_deploy.masks import Rle, masks_from_logits, rles_from_logits
from tap_deploy.prediction.options import PredictOptions
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions
from tap_deploy.sessions.pipeline import DecodedPrompts, Embeddings, Lane, Pipeline
from tap_deploy.tokenizer import Tokenizer

OnProgress = Callable[[str, int, int], None]
OnIds = Callable[[slice, np.ndarray], None]

_DECODED_FIELDS = tuple(field.name for field in dataclasses.fields(DecodedPrompts))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A validated picture with its prompts: the input of the graphs.

    Attributes:
        prompts: prompts in pixels of the picture.
        frame: placement of the picture in the model frame.
        images: picture in the model frame, uint8 BGR ``[1, S, S, 3]``; None once encoded.
        embeddings: image embeddings; None until encoded.
        path: path of the picture; None if it was not a file.
    """

    prompts: Prompts
    frame: Frame
    images: np.ndarray | None
    embeddings: Embeddings | None
    path: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Masks:
    """Masks of a request at the size of the picture; None in the forms that were not requested.

    Attributes:
        full: bool ``[P, H, W]``.
        rles: run lengths, [P].
    """

    full: np.ndarray | None
    rles: list[Rle] | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CandidateMasks:
    """All M masks of every prompt, at the size of the picture.

    Attributes:
        rles: run lengths, [P][M].
        iou_predictions: predicted IoU, float32 ``[P, M]``.
    """

    rles: list[list[Rle]]
    iou_predictions: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """Graph outputs for a request.

    Attributes:
        prompts: prompts of the request.
        frame: placement of the picture in the model frame.
        decoded: outputs of the prompt decoder.
        ids: caption ids, int64 ``[P, L-1]``.
        masks: masks at the size of the picture, in the making; None if not started.
        candidates: masks and scores of all mask tokens, if requested.
        path: path of the picture; None if it was not a file.
    """

    prompts: Prompts
    frame: Frame
    decoded: DecodedPrompts
    ids: np.ndarray
    masks: Future[Masks] | None
    candidates: CandidateMasks | None
    path: str | None


class GraphCalls:
    """Runs the graphs on requests; thread-safe."""

    def __init__(self, pipeline: Pipeline, config: TapConfig, memory_limit_bytes: int) -> None:
        """Store the pipeline; see ``TapPredictor`` for ``memory_limit_bytes``."""
        self._pipeline, self.config = pipeline, config
        self._memory_limit_bytes = memory_limit_bytes

    def encode(self, lane: Lane, requests: list[Request]) -> list[Request]:
        """Encode the requests that are not encoded yet, in one batch, and return all of them."""
        images = [request.images for request in requests if request.images is not None]
        fresh = iter(lane.encode_batch(np.concatenate(images)) if images else ())
        return [
            request
            if request.images is None
            else dataclasses.replace(request, images=None, embeddings=next(fresh))
            for request in requests
        ]

    def encode_in_lane(self, requests: list[Request]) -> list[Request]:
        """Take a lane and ``encode``."""
        with self._pipeline.lane() as lane:
            return self.encode(lane, requests)

    def answer(
        self, lane: Lane, request: Request, options: PredictOptions, report: OnProgress
    ) -> Answer:
        """Decode the prompts of an encoded request and write captions."""
        decoded = self.decode(lane, request, report, masks=options.masks is not False)
        candidates = self._candidates(lane, request) if options.candidates else None
        masks = None
        if lane.on_gpu and options.captions and options.masks:
            # The CPU makes masks while the GPU writes captions.
            pool = ThreadPoolExecutor(1)
            masks = pool.submit(_masks, decoded, request.frame, options)
            pool.shutdown(wait=False)
        ids = self.caption(lane, decoded.semantic_tokens, options, report)
        return Answer(
            prompts=request.prompts,
            frame=request.frame,
            decoded=decoded,
            ids=ids,
            masks=masks,
            candidates=candidates,
            path=request.path,
        )

    def warm_up(self, lane: Lane, request: Request, *, draws: bool) -> None:
        """Run every graph once and record the caption steps where the backend can."""
        for chunk in self._caption_chunks(len(request.prompts)):
            lane.record_captions(chunk.stop - chunk.start, draws=draws)
        one_token = PredictOptions(
            top_k=1,
            masks="rle",  # the shapes of calls with masks
            captions=True,
            vocabulary=None,
            max_new_tokens=1,
            temperature=1.0 if draws else 0.0,
            seed=None,
        )
        [request] = self.encode(lane, [request])
        self.answer(lane, request, one_token, no_progress)

    def answer_in_lane(self, request: Request, options: PredictOptions) -> Answer:
        """Take a lane and ``answer``."""
        with self._pipeline.lane() as lane:
            return self.answer(lane, request, options, no_progress)

    def decode(
        self, lane: Lane, request: Request, report: OnProgress, *, masks: bool = True
    ) -> DecodedPrompts:
        """Decode the prompts of an encoded request."""
        decoded = None
        for chunk, part in self.decode_chunks(lane, request, report, masks=masks):
            if chunk == slice(0, len(request.prompts)):
                return part
            decoded = decoded or self._empty_decoded(len(request.prompts), masks=masks)
            for name in _DECODED_FIELDS:
                if getattr(part, name) is not None:
                    getattr(decoded, name)[chunk] = getattr(part, name)
        return decoded or self._empty_decoded(0, masks=masks)

    def decode_chunks(
        self, lane: Lane, request: Request, report: OnProgress, *, masks: bool = True
    ) -> Iterator[tuple[slice, DecodedPrompts]]:
        """Run the prompt decoder in chunks; yield each with the prompts that it answers."""
        assert request.embeddings is not None
        prompts = request.prompts
        for chunk in _chunks(len(prompts), self._prompts_per_call(prompts)):
            report("decode prompts", chunk.start, len(prompts))
            yield (
                chunk,
                lane.decode_prompts(
                    request.embeddings,
                    prompts[chunk].model_coords(request.frame.scale),
                    np.ascontiguousarray(prompts[chunk].labels),
                    masks=masks,
                ),
            )

    def _candidates(self, lane: Lane, request: Request) -> CandidateMasks:
        """Run the prompt decoder again for the masks of all mask tokens."""
        assert request.embeddings is not None
        prompts, num_masks = request.prompts, self.config.num_mask_tokens
        found = CandidateMasks(
            rles=[], iou_predictions=np.empty((len(prompts), num_masks), np.float32)
        )
        chunk_size = max(1, self._prompts_per_call(prompts) // num_masks)
        for chunk in _chunks(len(prompts), chunk_size):
            part = lane.decode_candidates(
                request.embeddings,
                prompts[chunk].model_coords(request.frame.scale),
                np.ascontiguousarray(prompts[chunk].labels),
            )
            for masks in part.low_res_masks:
                found.rles.append(rles_from_logits(masks, request.frame))
            found.iou_predictions[chunk] = part.iou_predictions
        return found

    def _prompts_per_call(self, prompts: Prompts) -> int:
        return self._pipeline.max_prompts or prompts_per_call(
            self.config, prompts.coords.shape[1], self._memory_limit_bytes
        )

    def _empty_decoded(self, count: int, *, masks: bool) -> DecodedPrompts:
        size = self.config.low_res_mask_size
        return DecodedPrompts(
            low_res_masks=np.empty((count, size, size), np.float32) if masks else None,
            iou_predictions=np.empty(count, np.float32),
            mask_index=np.empty(count, np.int64),
            semantic_tokens=np.empty((count, self.config.image_embed_dim), np.float32),
            semantic_embeddings=np.empty((count, self.config.sem_embed_dim), np.float32),
        )

    def caption(
        self,
        lane: Lane,
        semantic_tokens: np.ndarray,
        options: PredictOptions,
        report: OnProgress,
        on_ids: OnIds | None = None,
    ) -> np.ndarray:
        """Write captions in chunks, which may be larger than those of the prompt decoder.

        Args:
            lane: runs the text decoder.
            semantic_tokens: float32 ``[P, C]``.
            options: of the captions.
            report: called before each chunk.
            on_ids: called with the regions of a chunk and their ids so far; see
                ``CaptionWriter.generate``.

        Returns:
            Caption ids, int64 ``[P, L-1]``.
        """
        rng, count = np.random.default_rng(options.seed), len(semantic_tokens)
        parts = [np.empty((0, self.config.text_seq_len - 1), np.int64)]
        for chunk in self._caption_chunks(count):
            report("write captions", chunk.start, count)
            ids = lane.caption(
                semantic_tokens[chunk],
                max_new_tokens=options.max_new_tokens if options.captions else 0,
                temperature=options.temperature,
                rng=rng,
                on_ids=None if on_ids is None else functools.partial(on_ids, chunk),
            )
            parts.append(ids)
        return np.concatenate(parts)

    def _caption_chunks(self, count: int) -> list[slice]:
        most = captions_per_call(self.config, self._memory_limit_bytes)
        return _chunks(count, self._pipeline.max_prompts or most)


def regions_from(answer: Answer, options: PredictOptions, tokenizer: Tokenizer | None) -> Regions:
    """Convert an answer: logits to masks, embeddings to concepts, ids to text."""
    frame, decoded, vocabulary = answer.frame, answer.decoded, options.vocabulary
    candidates, embeddings = answer.candidates, decoded.semantic_embeddings
    started = answer.masks
    masks = _masks(decoded, frame, options) if started is None else started.result()
    return Regions(
        masks=masks.full,
        rles=masks.rles,
        concepts=None if vocabulary is None else vocabulary.top_k(embeddings, options.top_k),
        captions=tokenizer.decode(answer.ids) if options.captions and tokenizer else None,
        caption_ids=answer.ids,
        prompts=answer.prompts,
        image_height=frame.height,
        image_width=frame.width,
        image_path=answer.path,
        vocabulary=vocabulary,
        candidate_rles=None if candidates is None else candidates.rles,
        candidate_iou_predictions=None if candidates is None else candidates.iou_predictions,
        **{field.name: getattr(decoded, field.name) for field in dataclasses.fields(decoded)},
    )


def _masks(decoded: DecodedPrompts, frame: Frame, options: PredictOptions) -> Masks:
    logits = decoded.low_res_masks
    if logits is None or not options.masks:
        return Masks(full=None, rles=None)
    if options.masks == "rle":
        return Masks(full=None, rles=rles_from_logits(logits, frame))
    return Masks(full=masks_from_logits(logits, frame), rles=None)


def no_progress(stage: str, done: int, total: int) -> None:
    """Ignore progress; the default callback."""


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
