"""The prediction API: encode a picture once and prompt it many times, or stream many pictures."""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.concepts import Vocabulary
from tap_deploy.config import TapConfig
from tap_deploy.errors import InputError, TapError, require_int
from tap_deploy.image import frame_image
from tap_deploy.pictures.source import ImageSource
from tap_deploy.prediction.answers import (
    Answer,
    GraphCalls,
    OnProgress,
    Request,
    no_progress,
    regions_from,
)
from tap_deploy.prediction.inputs import (
    EncodedImage,
    Picture,
    blank_request,
    gather_prompts,
    in_brackets,
    path_of,
    picture_and_prompts,
    request_from,
    require_many,
)
from tap_deploy.prediction.options import Masks, PredictOptions, check_vocabulary
from tap_deploy.prediction.read_ahead import ReadAhead
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.host_pipeline import HostPipeline
from tap_deploy.sessions.opening import pipeline_from_bundle
from tap_deploy.sessions.options import DeviceOptions
from tap_deploy.sessions.pipeline import Pipeline
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.tokenizer import Tokenizer

DEFAULT_MEMORY_LIMIT_BYTES = 1 << 30


class TapPredictor:
    """Segments, names and captions regions of a picture, without torch.

    Thread-safe. Every process, forked or not, must load its own; see ``docs/runtime.md``.

    Example:
        >>> predictor = TapPredictor.from_bundle("tap_vit_b")
        >>> regions = predictor.predict("photo.jpg", points=[[[320, 240, 1]]])
        >>> regions.captions
    """

    def __init__(
        self,
        sessions: Mapping[str, Session] | Pipeline,
        config: TapConfig,
        *,
        vocabulary: Vocabulary | None = None,
        tokenizer: Tokenizer | None = None,
        memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
    ) -> None:
        """Build a predictor from parts; most users call ``from_bundle`` instead.

        Args:
            sessions: one session per graph name, or a whole pipeline; the predictor closes them.
            config: sizes of the model.
            vocabulary: concepts that regions are classified into.
            tokenizer: decodes caption ids to text.
            memory_limit_bytes: bound on the working memory of a graph call, bytes. Prompts that
                exceed it run in chunks. Engines are limited by their own profile instead.
        """
        require_int("memory_limit_bytes", memory_limit_bytes, 1)
        self.config = config
        self.tokenizer = tokenizer
        self._pipeline: Pipeline = (
            sessions if isinstance(sessions, Pipeline) else HostPipeline(sessions, config)
        )
        self._vocabulary = vocabulary
        self._calls = GraphCalls(self._pipeline, config, memory_limit_bytes)
        self._current: EncodedImage | None = None
        self.vocabulary = vocabulary

    @classmethod
    def from_bundle(
        cls,
        path: str | os.PathLike[str],
        backend: str = "onnxruntime",
        precision: str = "fp32",
        threads: int | None = None,
        *,
        device: str | None = None,
        provider: str | None = None,
        device_options: DeviceOptions | None = None,
        memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
        check_hashes: bool = True,
        allow_failed: bool = False,
    ) -> TapPredictor:
        """Load a bundle; on the CPU, the text decoder at the first caption or ``warm_up``.

        Args:
            path: folder of the bundle.
            backend: backend that runs the graphs; see ``tap_deploy.sessions.run_on.BACKENDS``.
            precision: ``fp32``, or another precision of the bundle.
            threads: CPU threads per call; None for one per core available to this process.
            device: ``cpu``, ``cuda`` or ``cuda:N``; None for the CPU with onnxruntime, and for
                the first GPU with ``tensorrt`` and ``tensorrt_rtx``.
            provider: GPU execution provider of onnxruntime: ``cuda`` (default), ``tensorrt`` or
                ``nv_tensorrt_rtx``.
            device_options: GPU options: concurrent calls, CUDA graphs, and more.
            memory_limit_bytes: bound on the working memory of a graph call, bytes.
            check_hashes: verify the SHA-256 of every file against the manifest first.
            allow_failed: also load a precision that failed its accuracy check, and engines that
                failed their self-test.

        Raises:
            BundleError: the bundle is missing, incomplete or modified, or lacks the precision or
                the engine, or these failed their check.
            InputError: invalid or conflicting arguments.
            SessionError: the backend is unknown, or a graph does not load.
            MissingDependencyError: a package is not installed.
        """
        bundle = Bundle.open(path, check_hashes=check_hashes)
        vocabulary, tokenizer = bundle.vocabulary(), bundle.tokenizer()
        require_int("memory_limit_bytes", memory_limit_bytes, 1)
        run_on = RunOn(
            backend=backend,
            precision=precision,
            device=device,
            provider=provider,
            threads=threads,
            allow_failed=allow_failed,
        )
        pipeline = pipeline_from_bundle(bundle, run_on, device_options)
        return cls(
            pipeline,
            bundle.config,
            vocabulary=vocabulary,
            tokenizer=tokenizer,
            memory_limit_bytes=memory_limit_bytes,
        )

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Concepts that regions are classified into; assign another vocabulary to replace it."""
        return self._vocabulary

    @vocabulary.setter
    def vocabulary(self, vocabulary: Vocabulary | None) -> None:
        if vocabulary is not None:
            check_vocabulary(vocabulary, self.config)
        self._vocabulary = vocabulary

    def warm_up(self, num_regions: int = 1, *, draws: bool = False) -> None:
        """Make the first call as fast as later ones, in every context.

        Runs every graph once on a blank picture, because backends load kernels and allocate
        memory on first use. On a GPU, also records the caption steps as CUDA graphs.

        Args:
            num_regions: regions per call. Warm up once for each number of regions in use.
            draws: also prepare sampling, for calls with a temperature above 0.

        Raises:
            InputError: ``num_regions`` is not a positive integer.
            SessionError: the backend failed, or this thread is within a call of this predictor.
        """
        require_int("num_regions", num_regions, 1)
        request = blank_request(self.config.image_size, num_regions)
        with self._pipeline.all_lanes() as lanes:
            for lane in lanes:
                self._calls.warm_up(lane, request, draws=draws)

    def encode(self, image: ImageSource) -> EncodedImage:
        """Run the image encoder.

        Args:
            image: path, bytes of a file, binary file object, PIL image, uint8 ``[H, W, 3]`` RGB,
                or a ``PictureFile`` with read options; see ``load_image``.

        Raises:
            InputError: not an 8-bit RGB picture of at least 2 x 2 pixels.
            SessionError: the backend failed.
        """
        images, frame = frame_image(image, self.config.image_size)
        with self._pipeline.lane() as lane:
            return EncodedImage(embeddings=lane.encode(images), frame=frame, path=path_of(image))

    def set_image(self, image: ImageSource | EncodedImage) -> None:
        """Encode a picture and use it for later calls of ``predict`` without an image."""
        self._current = image if isinstance(image, EncodedImage) else self.encode(image)

    def predict(
        self,
        image: ImageSource | EncodedImage | None = None,
        points: Any = None,
        boxes: Any = None,
        *,
        prompts: Prompts | None = None,
        top_k: int = 1,
        masks: Masks = True,
        candidates: bool = False,
        captions: bool = True,
        vocabulary: Vocabulary | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        clip: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Regions:
        """Segment, name and caption P regions.

        Args:
            image: a picture as in ``encode``, an encoded picture, or None for the picture of
                ``set_image``.
            points: float ``[P, N, 3]`` (x, y, label) in pixels of the original image, or a
                list of P lists of any length. Labels: 0 background, 1 foreground, 2 and 3 the
                left-top and right-bottom corners of a box, 4 padding.
            boxes: float ``[P, 4]`` XYXY, pixels of the original image. If points are given too,
                box i and the points of row i together prompt region i.
            prompts: points, boxes or sketches as ``Prompts``, instead of points and boxes.
            top_k: names per region, best first.
            masks: True for full-size masks, ``"rle"`` for run lengths only (``Regions.rles``),
                without an allocation of the picture's size, False for neither.
            candidates: also return the masks of all M tokens with their scores, as run lengths
                (``Regions.candidate_rles``); this runs the prompt decoder a second time.
            captions: write captions; if False, ``caption_ids`` contain BOS and padding.
            vocabulary: concepts for this call, overriding the predictor's.
            max_new_tokens: maximum caption length, tokens; None for the model's maximum.
            temperature: 0 for greedy decoding, above 0 to sample.
            seed: seed of the sampling.
            clip: move points and boxes that lie outside the picture to its border instead of
                raising an error, and log how many were moved.
            on_progress: called with the stage name, regions done, and the total.

        Returns:
            ``Regions``; empty for P = 0. All prompts of a call are padded to the same number of
            points, as in training, so a region's result can depend slightly on the other prompts.

        Raises:
            InputError: invalid argument; the message says which and why.
            SessionError: the backend failed.
        """
        options = PredictOptions(
            top_k=top_k,
            masks=masks,
            captions=captions,
            vocabulary=self._vocabulary_or(vocabulary),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            candidates=candidates,
            clip=clip,
        )
        prompts = gather_prompts(points, boxes, prompts)
        image = self._current if image is None else image
        if image is None:
            raise InputError("no image: pass one to predict, or call set_image first")
        report = on_progress if on_progress is not None else no_progress
        report("encode image", 0, 1)
        request = request_from(image, prompts, self.config.image_size, options)
        with self._pipeline.lane() as lane:
            [request] = self._calls.encode(lane, [request])
            answer = self._calls.answer(lane, request, options, report)
        report("make masks", 0, len(prompts))
        return regions_from(answer, options, self.tokenizer)

    def predict_many(
        self,
        images: Iterable[Picture | tuple[Picture, Prompts]],
        points: Any = None,
        boxes: Any = None,
        *,
        prompts: Prompts | None = None,
        top_k: int = 1,
        masks: Masks = True,
        candidates: bool = False,
        captions: bool = True,
        vocabulary: Vocabulary | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        clip: bool = False,
        read_ahead: int = 2,
        on_error: Callable[[int, TapError], None] | None = None,
    ) -> Iterator[Regions]:
        """Segment, name and caption regions of many pictures; yield the regions in order.

        Each result equals that of ``predict``. Different pictures overlap: threads read and resize
        the next ones while the graphs run on one and the masks of the previous one are made. Only
        these threads hold full-size pictures, at most ``read_ahead`` in advance.

        Example:
            >>> pairs = ((path, Prompts.from_boxes(boxes)) for path, boxes in detections)
            >>> for regions in predictor.predict_many(pairs, masks="rle"):
            ...     print(regions.to_json())

        Args:
            images: iterable of pictures as in ``predict``, or of pairs (picture, ``Prompts``). It
                is iterated in the caller's thread.
            points: points for every picture; see ``predict``. Not with pairs.
            boxes: boxes for every picture; see ``predict``. Not with pairs.
            prompts: prompts for every picture, instead of points and boxes. Not with pairs.
            top_k: see ``predict``.
            masks: see ``predict``.
            candidates: see ``predict``.
            captions: see ``predict``.
            vocabulary: see ``predict``.
            max_new_tokens: see ``predict``.
            temperature: see ``predict``.
            seed: seed of the sampling, applied to each picture separately as in ``predict``.
            clip: see ``predict``.
            read_ahead: pictures prepared in advance, each in its own thread; at least one batch
                if the image encoder takes batches.
            on_error: called in order with the index (from 0) of an invalid picture and the error;
                nothing is yielded for that picture, so use ``Regions.image_path`` to identify the
                others. None raises the error, which ends the iteration.

        Raises:
            InputError: invalid argument, raised at the call. Errors of a picture or its prompts
                are raised in order, with index and path of the picture.
            SessionError: the backend failed.
        """
        options = PredictOptions(
            top_k=top_k,
            masks=masks,
            captions=captions,
            vocabulary=self._vocabulary_or(vocabulary),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            candidates=candidates,
            clip=clip,
        )
        require_int("read_ahead", read_ahead, 1)
        require_many(images)
        one_by_one = points is None and boxes is None and prompts is None
        shared = None if one_by_one else gather_prompts(points, boxes, prompts)
        return self._predict_many(images, shared, options, read_ahead, on_error)

    def _predict_many(
        self,
        images: Iterable[Picture | tuple[Picture, Prompts]],
        shared: Prompts | None,
        options: PredictOptions,
        read_ahead: int,
        on_error: Callable[[int, TapError], None] | None,
    ) -> Iterator[Regions]:
        size = self.config.image_size
        ahead: ReadAhead[Picture | tuple[Picture, Prompts], Request, Answer] = ReadAhead(
            lambda item: request_from(*picture_and_prompts(item, shared), size, options),
            self._calls.encode_in_lane,
            lambda request: self._calls.answer_in_lane(request, options),
            group_size=self._pipeline.max_images,
            read_ahead=read_ahead,
        )
        with contextlib.closing(ahead.run(images)) as results:
            for index, (item, future) in enumerate(results):
                try:
                    answer = future.result()
                except TapError as exc:
                    if on_error is None or not isinstance(exc, InputError):
                        raise type(exc)(f"picture {index}{in_brackets(item)}: {exc}") from exc
                    on_error(index, exc)
                    continue
                yield regions_from(answer, options, self.tokenizer)

    def close(self) -> None:
        """Wait for running calls, then free the sessions. Closing twice has no effect.

        Raises:
            SessionError: this thread is within a call of this predictor.
        """
        self._pipeline.close()

    def __enter__(self) -> TapPredictor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.close()

    def _vocabulary_or(self, vocabulary: Vocabulary | None) -> Vocabulary | None:
        """Return the checked vocabulary of a call, or the predictor's if it has none."""
        if vocabulary is None:
            return self._vocabulary
        check_vocabulary(vocabulary, self.config)
        return vocabulary
