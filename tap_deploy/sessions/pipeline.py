"""Interfaces for running the three graphs as one pipeline: ``Pipeline``, ``Lane``, ``Embeddings``.

A predictor takes a lane, encodes a picture, decodes prompts, writes captions, and returns the lane.
Image embeddings stay in host memory (``HostPipeline``) or device memory (``DevicePipeline``); all
other inputs and outputs are host arrays.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tap_deploy import graphs
from tap_deploy.sessions.caption_writer import OnIds
from tap_deploy.sessions.processes import ProcessBound

CLOSED = "this predictor is closed; load the bundle again"


class Embeddings(abc.ABC):
    """Image embeddings of one picture, in host or device memory."""

    @abc.abstractmethod
    def numpy(self) -> np.ndarray:
        """Return them as float32 ``[1, C, grid, grid]``.

        Raises:
            SessionError: the pipeline that made them is closed.
        """


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DecodedPrompts:
    """Outputs of the prompt decoder for the mask token that answers each prompt.

    Attributes:
        low_res_masks: mask logits in the model frame, float32 ``[P, S, S]``; None if not wanted.
        iou_predictions: predicted IoU, float32 ``[P]``.
        mask_index: selected mask token, int64 ``[P]``.
        semantic_tokens: input of the text decoder, float32 ``[P, C]``.
        semantic_embeddings: input of the concept classifier, float32 ``[P, E]``.
    """

    low_res_masks: np.ndarray | None
    iou_predictions: np.ndarray
    mask_index: np.ndarray
    semantic_tokens: np.ndarray
    semantic_embeddings: np.ndarray

    @classmethod
    def from_outputs(cls, outputs: Mapping[str, np.ndarray]) -> DecodedPrompts:
        """Convert the outputs of a call with one requested mask token per prompt."""
        index = outputs[graphs.MASK_INDEX][:, 0].astype(np.int64)
        scores = outputs[graphs.IOU_PREDICTIONS][np.arange(len(index)), index]
        names = (graphs.LOW_RES_MASKS, graphs.SEMANTIC_TOKENS, graphs.SEMANTIC_EMBEDDINGS)
        floats: dict[str, Any] = dict.fromkeys(names)
        for name in outputs.keys() & set(names):
            floats[name] = outputs[name][:, 0].astype(np.float32, copy=False)
        return cls(
            mask_index=index, iou_predictions=scores.astype(np.float32, copy=False), **floats
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """Masks of all M mask tokens of every prompt.

    Attributes:
        low_res_masks: mask logits in the model frame, float32 ``[P, M, S, S]``.
        iou_predictions: predicted IoU, float32 ``[P, M]``.
    """

    low_res_masks: np.ndarray
    iou_predictions: np.ndarray

    @classmethod
    def from_outputs(cls, outputs: Mapping[str, np.ndarray]) -> Candidates:
        """Convert the outputs of a call that requested every mask token."""
        return cls(
            low_res_masks=outputs[graphs.LOW_RES_MASKS].astype(np.float32, copy=False),
            iou_predictions=outputs[graphs.IOU_PREDICTIONS].astype(np.float32, copy=False),
        )


class Lane(abc.ABC):
    """The graphs with the state of a call; lent to one call at a time unless shared.

    Attributes:
        on_gpu: whether the graphs leave the CPU idle.
    """

    on_gpu: bool = False

    def encode(self, images: np.ndarray) -> Embeddings:
        """Run the image encoder on uint8 ``[1, S, S, 3]`` BGR in the model frame."""
        [embeddings] = self.encode_batch(images)
        return embeddings

    @abc.abstractmethod
    def encode_batch(self, images: np.ndarray) -> list[Embeddings]:
        """Run the image encoder on uint8 ``[B, S, S, 3]``, B up to the pipeline's ``max_images``.

        Returns:
            The embeddings of each picture, in order.
        """

    @abc.abstractmethod
    def decode_prompts(
        self, embeddings: Embeddings, coords: np.ndarray, labels: np.ndarray, *, masks: bool = True
    ) -> DecodedPrompts:
        """Run the prompt decoder for the token that answers each prompt.

        Args:
            embeddings: embeddings from ``encode`` of the same pipeline.
            coords: float32 ``[P, N, 2]`` XY, pixels of the model frame.
            labels: int32 ``[P, N]``.
            masks: whether masks are wanted; without them, the graph upscales for one prompt only.

        Raises:
            InputError: more prompts or points than the graph takes, or embeddings of another
                pipeline.
            SessionError: the backend failed.
        """

    @abc.abstractmethod
    def decode_candidates(
        self, embeddings: Embeddings, coords: np.ndarray, labels: np.ndarray
    ) -> Candidates:
        """Run the prompt decoder for the masks of all M mask tokens of P prompts.

        Arguments as in ``decode_prompts``.

        Raises:
            InputError: as in ``decode_prompts``, or P > 1 and P x M exceeds the number of prompts
                that the graph takes.
            SessionError: the backend failed.
        """

    @abc.abstractmethod
    def caption(
        self,
        semantic_tokens: np.ndarray,
        *,
        max_new_tokens: int | None,
        temperature: float,
        rng: np.random.Generator,
        on_ids: OnIds | None = None,
    ) -> np.ndarray:
        """Write a caption for each of ``semantic_tokens``; see ``CaptionWriter.generate``."""

    @abc.abstractmethod
    def record_captions(self, rows: int, *, draws: bool) -> None:
        """Record the caption steps for ``rows`` regions, so that the first call is not slower.

        Args:
            rows: regions per batch.
            draws: record for sampling (temperature above 0) instead of greedy decoding.
        """


class Pipeline(ProcessBound, abc.ABC):
    """The loaded graphs of a model; thread-safe.

    Usable only in the process that created it, see ``ProcessBound``.

    Attributes:
        max_prompts: largest number of prompts per ``decode_prompts`` and rows per ``caption``;
            None if only memory limits them.
        max_images: largest number of pictures per ``encode_batch``; 1 if batches bring no speedup.
    """

    max_prompts: int | None = None
    max_images: int = 1

    @abc.abstractmethod
    def lane(self) -> contextlib.AbstractContextManager[Lane]:
        """Lend a lane for one call, waiting while all are in use.

        Raises:
            SessionError: the pipeline is closed, or was created in another process.
        """

    @contextlib.contextmanager
    def all_lanes(self) -> Iterator[Sequence[Lane]]:
        """Lend all lanes.

        Raises:
            SessionError: the pipeline is closed, or was created in another process.
        """
        with self.lane() as lane:
            yield [lane]

    @abc.abstractmethod
    def close(self) -> None:
        """Wait for running calls, then free everything.

        Does nothing the second time, and in a forked process.

        Raises:
            SessionError: a call is running in this thread.
        """


FOREIGN = "this picture was encoded by another predictor; encode it with this one"
