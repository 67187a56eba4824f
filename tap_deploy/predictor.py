"""TapPredictor: encode a picture once, prompt it many times."""

from __future__ import annotations

import dataclasses
import numbers
import os
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tap_deploy import graphs
from tap_deploy.bundle import Bundle
from tap_deploy.captioner import Captioner
from tap_deploy.concepts import Vocabulary
from tap_deploy.config import TapConfig
from tap_deploy.errors import InputError, SessionError
from tap_deploy.image import Frame, ImageSource, load_image, model_image
from tap_deploy.masks import masks_from_logits, select_mask_token
from tap_deploy.memory import captions_per_call, prompts_per_call
from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions
from tap_deploy.sessions import sessions_from_bundle
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.float_types import to_float32, to_spec_dtypes
from tap_deploy.tokenizer import Tokenizer

DEFAULT_MEMORY_LIMIT_BYTES = 1 << 30

OnProgress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EncodedImage:
    """A picture that went through the image encoder.

    image_embeddings: float32 ``[1, C, grid, grid]``.
    frame: where the picture lies in the model frame.
    """

    image_embeddings: np.ndarray
    frame: Frame


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Decoded:
    """The chosen token of every prompt: what is left of the prompt decoder's outputs."""

    low_res_masks: np.ndarray  # float32 [P, S, S]
    iou_predictions: np.ndarray  # float32 [P]
    mask_index: np.ndarray  # int64 [P]
    semantic_tokens: np.ndarray  # float32 [P, C]
    semantic_embeddings: np.ndarray  # float32 [P, E]


_DECODED_FIELDS = tuple(field.name for field in dataclasses.fields(_Decoded))


class TapPredictor:
    """Masks, names and captions of regions of a picture, without torch.

    Example:
        >>> predictor = TapPredictor.from_bundle("tap_vit_b")
        >>> regions = predictor.predict("photo.jpg", points=[[[320, 240, 1]]])
        >>> regions.captions
    """

    def __init__(
        self,
        sessions: Mapping[str, Session],
        config: TapConfig,
        *,
        vocabulary: Vocabulary | None = None,
        tokenizer: Tokenizer | None = None,
        memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
    ) -> None:
        """Put a predictor together from parts; ``from_bundle`` is the usual way.

        Args:
            sessions: one session per graph name.
            config: sizes of the model.
            vocabulary: concepts to choose names from.
            tokenizer: turns caption ids into text.
            memory_limit_bytes: bound on the working memory of a graph call, in bytes; more
                prompts than fit are run in chunks.
        """
        _require_int("memory_limit_bytes", memory_limit_bytes, 1)
        self.config = config
        self.tokenizer = tokenizer
        self._sessions = dict(sessions)
        self._captioner = Captioner(self._sessions[graphs.TEXT_DECODER], config)
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
        memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
        check_hashes: bool = True,
    ) -> TapPredictor:
        """Load a bundle.

        Args:
            path: the folder of the bundle.
            backend: what runs the graphs; see ``tap_deploy.sessions.BACKENDS``.
            precision: ``fp32``, or another one that the bundle holds.
            threads: CPU threads of a call; None leaves the choice to the backend.
            memory_limit_bytes: bound on the working memory of a graph call, in bytes.
            check_hashes: compare the SHA-256 of every file with the manifest first.

        Raises:
            BundleError: the bundle is missing, incomplete or changed, or lacks the precision.
            SessionError: the backend is unknown, or a graph does not load.
            MissingDependencyError: the backend is not installed.
        """
        bundle = Bundle.open(path, check_hashes=check_hashes)
        return cls(
            sessions_from_bundle(bundle, backend, precision, threads=threads),
            bundle.config,
            vocabulary=bundle.vocabulary(),
            tokenizer=bundle.tokenizer(),
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
        return self._encode(*model_image(load_image(image), self.config.image_size))

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
        options = _Options(top_k, max_new_tokens if captions else 0, temperature, seed)
        vocabulary = self._vocabulary if vocabulary is None else vocabulary
        if vocabulary is not None:
            self._check_vocabulary(vocabulary)
        prompts = _gather_prompts(points, boxes, prompts)
        report = on_progress if on_progress is not None else _no_progress
        report("encode image", 0, 1)
        encoded = self._encoded(image, prompts)
        decoded = self._decode(encoded, prompts, report)
        ids = self._caption(decoded.semantic_tokens, options, report)
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
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()

    def __enter__(self) -> TapPredictor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.close()

    def _session(self, name: str) -> Session:
        if name not in self._sessions:
            raise SessionError("this predictor is closed; load the bundle again")
        return self._sessions[name]

    def _encode(self, images: np.ndarray, frame: Frame) -> EncodedImage:
        outputs = to_float32(self._session(graphs.IMAGE_ENCODER).run({graphs.IMAGES: images}))
        return EncodedImage(image_embeddings=outputs[graphs.IMAGE_EMBEDDINGS], frame=frame)

    def _encoded(self, image: ImageSource | EncodedImage | None, prompts: Prompts) -> EncodedImage:
        """Encode unless that was done before; prompts are checked first, as they are cheap."""
        image = self._current if image is None else image
        if image is None:
            raise InputError("no image: pass one to predict, or call set_image first")
        if isinstance(image, EncodedImage):
            prompts.check(image.frame.width, image.frame.height)
            return image
        images, frame = model_image(load_image(image), self.config.image_size)
        prompts.check(frame.width, frame.height)
        return self._encode(images, frame)

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

    def _decode(self, encoded: EncodedImage, prompts: Prompts, report: OnProgress) -> _Decoded:
        """Run the prompt decoder in chunks, keeping the chosen token of each prompt."""
        num_points = prompts.coords.shape[1]
        chunk_size = prompts_per_call(self.config, num_points, self._memory_limit_bytes)
        decoded = self._empty_decoded(len(prompts))
        for chunk in _chunks(len(prompts), chunk_size):
            report("decode prompts", chunk.start, len(prompts))
            part = self._decode_chunk(encoded, prompts[chunk])
            for name in _DECODED_FIELDS:
                getattr(decoded, name)[chunk] = getattr(part, name)
        return decoded

    def _decode_chunk(self, encoded: EncodedImage, prompts: Prompts) -> _Decoded:
        session = self._session(graphs.PROMPT_DECODER)
        inputs = {
            graphs.IMAGE_EMBEDDINGS: encoded.image_embeddings,
            graphs.POINT_COORDS: prompts.model_coords(encoded.frame.scale),
            graphs.POINT_LABELS: np.ascontiguousarray(prompts.labels),
        }
        outputs = to_float32(session.run(to_spec_dtypes(session.spec, inputs)))
        index = select_mask_token(outputs[graphs.IOU_PREDICTIONS], prompts.labels)
        rows = np.arange(len(prompts))
        return _Decoded(
            low_res_masks=outputs[graphs.LOW_RES_MASKS][rows, index],
            iou_predictions=outputs[graphs.IOU_PREDICTIONS][rows, index],
            mask_index=index,
            semantic_tokens=outputs[graphs.SEMANTIC_TOKENS][rows, index],
            semantic_embeddings=outputs[graphs.SEMANTIC_EMBEDDINGS][rows, index],
        )

    def _empty_decoded(self, count: int) -> _Decoded:
        size = self.config.low_res_mask_size
        return _Decoded(
            low_res_masks=np.empty((count, size, size), np.float32),
            iou_predictions=np.empty(count, np.float32),
            mask_index=np.empty(count, np.int64),
            semantic_tokens=np.empty((count, self.config.image_embed_dim), np.float32),
            semantic_embeddings=np.empty((count, self.config.sem_embed_dim), np.float32),
        )

    def _caption(
        self, semantic_tokens: np.ndarray, options: _Options, report: OnProgress
    ) -> np.ndarray:
        rng = np.random.default_rng(options.seed)
        parts = [np.empty((0, self.config.text_seq_len - 1), np.int64)]
        chunk_size = captions_per_call(self.config, self._memory_limit_bytes)
        for chunk in _chunks(len(semantic_tokens), chunk_size):
            report("write captions", chunk.start, len(semantic_tokens))
            ids = self._captioner.generate(
                semantic_tokens[chunk],
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                rng=rng,
            )
            parts.append(ids)
        return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class _Options:
    """Arguments of ``predict`` that are only numbers, checked."""

    top_k: int
    max_new_tokens: int | None
    temperature: float
    seed: int | None

    def __post_init__(self) -> None:
        _require_int("top_k", self.top_k, 1)
        if self.max_new_tokens is not None:
            _require_int("max_new_tokens", self.max_new_tokens, 0)
        if self.seed is not None:
            _require_int("seed", self.seed, 0)
        _require_temperature(self.temperature)


def _require_int(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        raise InputError(f"{name} is {value!r}; expected a whole number of at least {minimum}")


def _require_temperature(value: Any) -> None:
    smallest = np.finfo(np.float32).tiny  # below, the logits divided by it overflow
    is_number = isinstance(value, numbers.Real)
    if not is_number or not (value == 0 or smallest <= value < float("inf")):
        raise InputError(f"temperature is {value!r}; expected 0, or {smallest:.0e} or more")


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
