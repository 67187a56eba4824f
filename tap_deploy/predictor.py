"""TapPredictor: encode a picture once, prompt it many times."""

from __future__ import annotations

import dataclasses
import os
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tap_deploy.bundle import Bundle
from tap_deploy.concepts import Vocabulary
from tap_deploy.config import TapConfig
from tap_deploy.errors import InputError
from tap_deploy.image import Frame, ImageSource, load_image, model_image
from tap_deploy.masks import masks_from_logits
from tap_deploy.memory import captions_per_call, prompts_per_call
from tap_deploy.predict_options import PredictOptions, require_int
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions
from tap_deploy.sessions import pipeline_from_bundle
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.options import DeviceOptions
from tap_deploy.sessions.pipeline import (
    DecodedPrompts,
    Embeddings,
    HostPipeline,
    Lane,
    Pipeline,
    Tokens,
)
from tap_deploy.tokenizer import Tokenizer

DEFAULT_MEMORY_LIMIT_BYTES = 1 << 30

OnProgress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EncodedImage:
    """A picture that went through the image encoder.

    embeddings: what the prompt decoder reads; on a GPU it stays there.
    frame: where the picture lies in the model frame.
    """

    embeddings: Embeddings
    frame: Frame

    @property
    def image_embeddings(self) -> np.ndarray:
        """The embeddings as float32 ``[1, C, grid, grid]``; from a GPU they are fetched."""
        return self.embeddings.numpy()


_DECODED_FIELDS = tuple(field.name for field in dataclasses.fields(DecodedPrompts))


class TapPredictor:
    """Masks, names and captions of regions of a picture, without torch.

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
        """Put a predictor together from parts; ``from_bundle`` is the usual way.

        Args:
            sessions: one session per graph name, or the graphs as a whole. The predictor closes
                them.
            config: sizes of the model.
            vocabulary: concepts to choose names from.
            tokenizer: turns caption ids into text.
            memory_limit_bytes: bound on the working memory of a graph call, in bytes; more
                prompts than fit are run in chunks. Engines have their own limit.
        """
        require_int("memory_limit_bytes", memory_limit_bytes, 1)
        self.config = config
        self.tokenizer = tokenizer
        self._pipeline: Pipeline = (
            sessions if isinstance(sessions, Pipeline) else HostPipeline(sessions, config)
        )
        self._vocabulary = vocabulary
        self._memory_limit_bytes = memory_limit_bytes
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
        """Load a bundle.

        Args:
            path: the folder of the bundle.
            backend: what runs the graphs; see ``tap_deploy.sessions.BACKENDS``.
            precision: ``fp32``, or another one that the bundle holds.
            threads: CPU threads of a call; None leaves the choice to the backend.
            device: ``cpu``, ``cuda`` or ``cuda:N``; None for the CPU with onnxruntime, and for
                the first GPU with ``tensorrt`` and ``tensorrt_rtx``.
            provider: how onnxruntime uses a GPU: ``cuda`` (default), ``tensorrt`` or
                ``nv_tensorrt_rtx``.
            device_options: choices for a GPU: calls at once, CUDA graphs, and more.
            memory_limit_bytes: bound on the working memory of a graph call, in bytes.
            check_hashes: compare the SHA-256 of every file with the manifest first.
            allow_failed: also load a precision whose accuracy check failed, and engines whose
                self-test did.

        Raises:
            BundleError: the bundle is missing, incomplete or changed, or lacks the precision or
                the engine; or they failed their check.
            InputError: arguments that cannot be used, or not together.
            SessionError: the backend is unknown, or a graph does not load.
            MissingDependencyError: a package is not installed.
        """
        bundle = Bundle.open(path, check_hashes=check_hashes)
        vocabulary, tokenizer = bundle.vocabulary(), bundle.tokenizer()
        require_int("memory_limit_bytes", memory_limit_bytes, 1)
        pipeline = pipeline_from_bundle(
            bundle,
            backend,
            precision,
            threads=threads,
            device=device,
            provider=provider,
            options=device_options,
            allow_failed=allow_failed,
        )
        return cls(
            pipeline,
            bundle.config,
            vocabulary=vocabulary,
            tokenizer=tokenizer,
            memory_limit_bytes=memory_limit_bytes,
        )

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Concepts that names are chosen from; assign another to swap them."""
        return self._vocabulary

    @vocabulary.setter
    def vocabulary(self, vocabulary: Vocabulary | None) -> None:
        if vocabulary is not None:
            self._check_vocabulary(vocabulary)
        self._vocabulary = vocabulary

    def encode(self, image: ImageSource) -> EncodedImage:
        """Run the image encoder.

        Args:
            image: path, PIL image, or uint8 ``[H, W, 3]`` RGB. The EXIF orientation of paths
                and PIL images is honoured.

        Raises:
            InputError: not an 8-bit RGB picture of at least 2 x 2 pixels.
            SessionError: the backend failed.
        """
        images, frame = model_image(load_image(image), self.config.image_size)
        with self._pipeline.lane() as lane:
            return EncodedImage(embeddings=lane.encode(images), frame=frame)

    def set_image(self, image: ImageSource | EncodedImage) -> None:
        """Encode a picture and keep it: ``predict`` without an image then uses it."""
        self._current = image if isinstance(image, EncodedImage) else self.encode(image)

    def predict(
        self,
        image: ImageSource | EncodedImage | None = None,
        points: Any = None,
        boxes: Any = None,
        *,
        prompts: Prompts | None = None,
        top_k: int = 1,
        masks: bool = True,
        captions: bool = True,
        vocabulary: Vocabulary | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> Regions:
        """Segment, name and caption P regions.

        Args:
            image: path, PIL image, uint8 ``[H, W, 3]`` RGB, the result of ``encode``, or None
                for the picture given to ``set_image``.
            points: float ``[P, N, 3]`` (x, y, label) in pixels of the original image, or a
                list of P lists of any length. Labels: 0 background, 1 foreground, 2 and 3 the
                left-top and right-bottom corners of a box, 4 padding.
            boxes: float ``[P, 4]`` XYXY, pixels of the original image. With points as well,
                region i is prompted by box i and the points of row i.
            prompts: points, boxes or sketches made with ``Prompts``, in place of both.
            top_k: names per region, best first.
            masks: make full-size masks.
            captions: write captions; without, ``caption_ids`` hold BOS and padding.
            vocabulary: concepts for this call, in place of the predictor's.
            max_new_tokens: longest caption, in tokens; None for as long as the model allows.
            temperature: 0 for the best token each time, above 0 to draw.
            seed: makes draws repeatable.
            on_progress: called with a stage's name, regions done and regions in all.

        Returns:
            ``Regions``; empty for P = 0. All prompts of a call are padded to one number of
            points, as in training, so a region's result may depend on its company a little.

        Raises:
            InputError: an argument cannot be used; the message says which and why.
            SessionError: the backend failed.
        """
        options = PredictOptions(top_k, max_new_tokens if captions else 0, temperature, seed)
        vocabulary = self._vocabulary if vocabulary is None else vocabulary
        if vocabulary is not None:
            self._check_vocabulary(vocabulary)
        prompts = _gather_prompts(points, boxes, prompts)
        report = on_progress if on_progress is not None else _no_progress
        report("encode image", 0, 1)
        images, embeddings, frame = self._prepared(image, prompts)
        with self._pipeline.lane() as lane:
            if images is not None:
                embeddings = lane.encode(images)
            assert embeddings is not None
            encoded = EncodedImage(embeddings=embeddings, frame=frame)
            tokens = lane.new_tokens(len(prompts))
            decoded = self._decode(lane, encoded, prompts, tokens, report)
            ids = self._caption(lane, tokens, len(prompts), options, report)
        report("draw masks", 0, len(prompts))
        return Regions(
            masks=masks_from_logits(decoded.low_res_masks, encoded.frame) if masks else None,
            concepts=_names(vocabulary, decoded.semantic_embeddings, options.top_k),
            captions=self.tokenizer.decode(ids) if captions and self.tokenizer else None,
            caption_ids=ids,
            prompts=prompts,
            image_height=encoded.frame.height,
            image_width=encoded.frame.width,
            **{name: getattr(decoded, name) for name in _DECODED_FIELDS},
        )

    def close(self) -> None:
        """Free the sessions; the predictor must not be used afterwards."""
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

    def _prepared(
        self, image: ImageSource | EncodedImage | None, prompts: Prompts
    ) -> tuple[np.ndarray | None, Embeddings | None, Frame]:
        """Return the picture in the model frame, or its embeddings if it was encoded before.

        Picture and prompts are checked before a lane is taken: that may fail, and needs no GPU.
        """
        image = self._current if image is None else image
        if image is None:
            raise InputError("no image: pass one to predict, or call set_image first")
        if isinstance(image, EncodedImage):
            prompts.check(image.frame.width, image.frame.height)
            return None, image.embeddings, image.frame
        images, frame = model_image(load_image(image), self.config.image_size)
        prompts.check(frame.width, frame.height)
        return images, None, frame

    def _check_vocabulary(self, vocabulary: Vocabulary) -> None:
        if not isinstance(vocabulary, Vocabulary):
            raise InputError(
                f"vocabulary is a {type(vocabulary).__name__}; expected a Vocabulary, "
                "see Vocabulary.load"
            )
        found, expected = vocabulary.weights.shape[0], self.config.sem_embed_dim
        if found != expected:
            raise InputError(
                f"concept weights have {found} rows; expected {expected}, "
                "the semantic embedding of this model"
            )

    def _decode(
        self,
        lane: Lane,
        encoded: EncodedImage,
        prompts: Prompts,
        tokens: Tokens,
        report: OnProgress,
    ) -> DecodedPrompts:
        """Run the prompt decoder in chunks, keeping the chosen token of each prompt."""
        num_points = prompts.coords.shape[1]
        chunk_size = self._pipeline.max_prompts or prompts_per_call(
            self.config, num_points, self._memory_limit_bytes
        )
        decoded = self._empty_decoded(len(prompts))
        for chunk in _chunks(len(prompts), chunk_size):
            report("decode prompts", chunk.start, len(prompts))
            part = lane.decode_prompts(
                encoded.embeddings,
                prompts[chunk].model_coords(encoded.frame.scale),
                np.ascontiguousarray(prompts[chunk].labels),
                tokens,
                chunk.start,
            )
            for name in _DECODED_FIELDS:
                getattr(decoded, name)[chunk] = getattr(part, name)
        return decoded

    def _empty_decoded(self, count: int) -> DecodedPrompts:
        size = self.config.low_res_mask_size
        return DecodedPrompts(
            low_res_masks=np.empty((count, size, size), np.float32),
            iou_predictions=np.empty(count, np.float32),
            mask_index=np.empty(count, np.int64),
            semantic_tokens=np.empty((count, self.config.image_embed_dim), np.float32),
            semantic_embeddings=np.empty((count, self.config.sem_embed_dim), np.float32),
        )

    def _caption(
        self, lane: Lane, tokens: Tokens, count: int, options: PredictOptions, report: OnProgress
    ) -> np.ndarray:
        rng = np.random.default_rng(options.seed)
        parts = [np.empty((0, self.config.text_seq_len - 1), np.int64)]
        chunk_size = self._pipeline.max_prompts or captions_per_call(
            self.config, self._memory_limit_bytes
        )
        for chunk in _chunks(count, chunk_size):
            report("write captions", chunk.start, count)
            ids = lane.caption(
                tokens,
                chunk,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                rng=rng,
            )
            parts.append(ids)
        return np.concatenate(parts)


def _gather_prompts(points: Any, boxes: Any, prompts: Prompts | None) -> Prompts:
    if prompts is not None:
        if not isinstance(prompts, Prompts):
            raise InputError(f"prompts is a {type(prompts).__name__}; expected Prompts")
        if points is not None or boxes is not None:
            raise InputError("prompts were given beside points or boxes; pass one or the other")
        return prompts
    if points is None and boxes is None:
        raise InputError("no prompt: pass points, boxes or prompts")
    if boxes is None:
        return Prompts.from_points(points)
    if points is None:
        return Prompts.from_boxes(boxes)
    return Prompts.from_points_and_boxes(points, boxes)


def _names(
    vocabulary: Vocabulary | None, semantic_embeddings: np.ndarray, top_k: int
) -> list[list[tuple[str, float]]] | None:
    return None if vocabulary is None else vocabulary.top_k(semantic_embeddings, top_k)


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _no_progress(stage: str, done: int, total: int) -> None:
    """Take the place of a progress callback."""
