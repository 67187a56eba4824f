"""The prediction API: encode a picture once and prompt it many times, or stream many pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tap_deploy.concepts import Vocabulary
from tap_deploy.errors import InputError, TapError, require_int
from tap_deploy.image import frame_image
from tap_deploy.pictures.source import ImageSource
from tap_deploy.prediction.answers import (
    Answer,
    OnProgress,
    Request,
    no_progress,
    regions_from,
)
from tap_deploy.prediction.captions import CaptionProgress, tokens_of, with_captions
from tap_deploy.prediction.everything import Search, name_filter
from tap_deploy.prediction.inputs import (
    EncodedImage,
    Picture,
    gather_prompts,
    in_brackets,
    path_of,
    picture_and_prompts,
    request_from,
    require_many,
)
from tap_deploy.prediction.loaded import LoadedModel
from tap_deploy.prediction.options import GridOptions, Masks, PredictOptions
from tap_deploy.prediction.read_ahead import ReadAhead
from tap_deploy.prediction.views import views_of
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions


class TapPredictor(LoadedModel):
    """Segments, names and captions regions of a picture, without torch.

    Thread-safe. Every process, forked or not, must load its own; see ``docs/runtime.md``.

    Example:
        >>> predictor = TapPredictor.from_bundle("tap_vit_b")
        >>> regions = predictor.predict("photo.jpg", points=[[[320, 240, 1]]])
        >>> regions.captions
    """

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
                without an allocation of the picture's size, False for no masks at all: names and
                captions take less time without the masks' part of the prompt decoder.
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
        image = self._picture(image)
        report = on_progress if on_progress is not None else no_progress
        report("encode image", 0, 1)
        request = request_from(image, prompts, self.config.image_size, options)
        with self._pipeline.lane() as lane:
            [request] = self._calls.encode(lane, [request])
            answer = self._calls.answer(lane, request, options, report)
        report("make masks", 0, len(prompts))
        return regions_from(answer, options, self.tokenizer)

    def caption_many(
        self,
        regions: Sequence[Regions],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        on_captions: Callable[[list[str]], None] | None = None,
    ) -> list[Regions]:
        """Write captions of regions that were predicted with ``captions=False``.

        Regions of several pictures share the batches. Masks and names can so be shown before the
        captions, and captions while they are written.

        Args:
            regions: results of ``predict`` or ``everything`` of this model.
            max_new_tokens: see ``predict``.
            temperature: see ``predict``.
            seed: see ``predict``.
            on_captions: called with the texts of all regions so far, in order: after every token
                on the CPU, every ``DeviceOptions.eos_interval_steps`` tokens on a GPU.

        Returns:
            Copies of ``regions`` with ``captions`` and ``caption_ids``.

        Raises:
            InputError: invalid argument.
            SessionError: the backend failed.
        """
        options = PredictOptions(
            top_k=1,
            masks=False,
            captions=True,
            vocabulary=None,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        tokens = tokens_of(regions, self.config)
        progress = CaptionProgress(len(tokens), self.tokenizer, on_captions)
        with self._pipeline.lane() as lane:
            ids = self._calls.caption(lane, tokens, options, no_progress, progress.on_ids)
        captions = None if self.tokenizer is None else self.tokenizer.decode(ids)
        return with_captions(regions, ids, captions)

    def everything(
        self,
        image: Picture | None = None,
        *,
        points_per_side: int = 32,
        pred_iou_thresh: float = 0.6,
        stability_score_thresh: float = 0.6,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        mask_nms_thresh: float = 0.5,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        only: Sequence[str] | None = None,
        only_thresh: float = 0.3,
        top_k: int = 1,
        masks: Masks = "rle",
        captions: bool = True,
        vocabulary: Vocabulary | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> Regions:
        """Segment, name and caption everything in a picture.

        Each point of a grid prompts one mask. Masks of a low predicted IoU or stability are
        dropped, then those that overlap with a better one. Only the rest is captioned. The
        thresholds suit the ``tap_demo`` model; see ``docs/pictures.md`` for their effect.

        Args:
            image: see ``predict``.
            points_per_side: the grid has the square of this number of points.
            pred_iou_thresh: masks are kept if their predicted IoU is above this.
            stability_score_thresh: masks are kept if their stability is at least this, 0 to 1:
                the IoU of the masks cut at ``stability_score_offset`` above and below 0. It is
                computed on the low-resolution logits, without the padding of the model frame.
            stability_score_offset: see ``stability_score_thresh``; in logits.
            box_nms_thresh: of two masks whose boxes have an IoU above this, the one with the
                higher predicted IoU is kept.
            mask_nms_thresh: the same, for the IoU of the masks at low resolution.
            crop_n_layers: also search crops of the picture, for small objects: 4 in layer 1, 16 in
                layer 2, and so on. Each is encoded like a picture.
            crop_nms_thresh: ``box_nms_thresh`` for regions of different crops; those of smaller
                crops are kept.
            crop_overlap_ratio: overlap of the crops of layer 1 as a share of the shorter side of
                the picture; half as much in layer 2, and so on.
            crop_n_points_downscale_factor: ``points_per_side`` is divided by this in each layer.
            only: keep only regions with one of these names, spelled as in the vocabulary.
            only_thresh: see ``Regions.matching``.
            top_k: see ``predict``.
            masks: see ``predict``.
            captions: see ``predict``.
            vocabulary: see ``predict``.
            max_new_tokens: see ``predict``.
            temperature: see ``predict``.
            seed: see ``predict``.
            on_progress: see ``predict``.

        Returns:
            ``Regions`` by predicted IoU, highest first, prompted by the points that found them.
            The ``low_res_masks`` of a region found in a crop are resampled to the whole picture.

        Raises:
            InputError: invalid argument; the message says which and why.
            SessionError: the backend failed.
        """
        grid = GridOptions(
            points_per_side=points_per_side,
            pred_iou_thresh=pred_iou_thresh,
            stability_score_thresh=stability_score_thresh,
            stability_score_offset=stability_score_offset,
            box_nms_thresh=box_nms_thresh,
            mask_nms_thresh=mask_nms_thresh,
            crop_n_layers=crop_n_layers,
            crop_nms_thresh=crop_nms_thresh,
            crop_overlap_ratio=crop_overlap_ratio,
            crop_n_points_downscale_factor=crop_n_points_downscale_factor,
        )
        options = PredictOptions(
            top_k=top_k,
            masks=masks,
            captions=captions,
            vocabulary=self._vocabulary_or(vocabulary),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        search = Search(self._calls, grid, options, name_filter(options, only, only_thresh))
        views = views_of(self._picture(image), self.config.image_size, grid, options)
        report = on_progress if on_progress is not None else no_progress
        report("encode image", 0, 1)
        with self._pipeline.lane() as lane:
            found = search.run(lane, views, report)
        report("make masks", 0, len(found.places))
        return found.regions(options, self.tokenizer)

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

    def _picture(self, image: Picture | None) -> Picture:
        """Return the picture of a call, or that of ``set_image`` if it has none."""
        image = self._current if image is None else image
        if image is None:
            raise InputError("no image: pass one, or call set_image first")
        return image
