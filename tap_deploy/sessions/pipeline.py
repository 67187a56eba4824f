"""The three graphs as one path from a picture to captions, wherever they run.

A predictor takes a lane, encodes, decodes prompts and writes captions in it, and gives it back.
Image embeddings stay where they are made: in an array of ``HostPipeline``, in device memory of
``DevicePipeline``. All else that a predictor sees is an array.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tap_deploy import graphs
from tap_deploy.sessions.processes import ProcessBound

CLOSED = "this predictor is closed; load the bundle again"


class Embeddings(abc.ABC):
    """Image embeddings of one picture, wherever they lie."""

    @abc.abstractmethod
    def numpy(self) -> np.ndarray:
        """Return them as float32 ``[1, C, grid, grid]``.

        Raises:
            SessionError: the pipeline that made them is closed.
        """


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DecodedPrompts:
    """The outputs of the prompt decoder for the token that answers each prompt."""

    low_res_masks: np.ndarray  # float32 [P, S, S]
    iou_predictions: np.ndarray  # float32 [P]
    mask_index: np.ndarray  # int64 [P]
    semantic_tokens: np.ndarray  # float32 [P, C]
    semantic_embeddings: np.ndarray  # float32 [P, E]

    @classmethod
    def from_outputs(cls, outputs: Mapping[str, np.ndarray]) -> DecodedPrompts:
        """Take the outputs of a call that asked for one token per prompt."""
        index = outputs[graphs.MASK_INDEX][:, 0].astype(np.int64)
        scores = outputs[graphs.IOU_PREDICTIONS][np.arange(len(index)), index]
        names = (graphs.LOW_RES_MASKS, graphs.SEMANTIC_TOKENS, graphs.SEMANTIC_EMBEDDINGS)
        return cls(
            mask_index=index,
            iou_predictions=scores.astype(np.float32, copy=False),
            **{name: outputs[name][:, 0].astype(np.float32, copy=False) for name in names},
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """The masks of all M tokens of every prompt, of which one answers it."""

    low_res_masks: np.ndarray  # float32 [P, M, S, S]
    iou_predictions: np.ndarray  # float32 [P, M]

    @classmethod
    def from_outputs(cls, outputs: Mapping[str, np.ndarray]) -> Candidates:
        """Take the outputs of a call that asked for every token."""
        return cls(
            low_res_masks=outputs[graphs.LOW_RES_MASKS].astype(np.float32, copy=False),
            iou_predictions=outputs[graphs.IOU_PREDICTIONS].astype(np.float32, copy=False),
        )


class Lane(abc.ABC):
    """The graphs as one call uses them; a pipeline lends it to one call at a time, or shares it."""

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
        self, embeddings: Embeddings, coords: np.ndarray, labels: np.ndarray
    ) -> DecodedPrompts:
        """Run the prompt decoder for the token that answers each prompt.

        Args:
            embeddings: what ``encode`` returned.
            coords: float32 ``[P, N, 2]`` XY, pixels of the model frame.
            labels: int32 ``[P, N]``.

        Raises:
            InputError: more prompts or points than the graph takes, or foreign embeddings.
            SessionError: the backend failed.
        """

    @abc.abstractmethod
    def decode_candidates(
        self, embeddings: Embeddings, coords: np.ndarray, labels: np.ndarray
    ) -> Candidates:
        """Run the prompt decoder for the masks of all M tokens of P prompts.

        Arguments as in ``decode_prompts``.

        Raises:
            InputError: P x M is more than the prompts that the graph takes and than M, or as
                ``decode_prompts``.
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
    ) -> np.ndarray:
        """Write a caption for each of ``semantic_tokens``; see ``CaptionWriter.generate``."""

    @abc.abstractmethod
    def record_captions(self, rows: int, *, draws: bool) -> None:
        """Prepare captions of ``rows`` regions, so that the first ones take no longer than others.

        Args:
            rows: regions of a batch.
            draws: whether tokens are drawn, at a temperature above 0.
        """


class Pipeline(ProcessBound, abc.ABC):
    """The graphs of a model, loaded. Calls from several threads are safe.

    It works in the process that made it only, see ``ProcessBound``.

    max_prompts: most prompts of one ``decode_prompts`` and rows of one ``caption``; None where
        only memory limits them.
    max_images: most pictures of one ``encode_batch``; 1 where a batch does not pay.
    """

    max_prompts: int | None = None
    max_images: int = 1

    @abc.abstractmethod
    def lane(self) -> contextlib.AbstractContextManager[Lane]:
        """Take a lane for one call, waiting for one if all are taken.

        Raises:
            SessionError: the pipeline is closed, or of another process.
        """

    @contextlib.contextmanager
    def all_lanes(self) -> Iterator[Sequence[Lane]]:
        """Take every lane there is.

        Raises:
            SessionError: the pipeline is closed, or of another process.
        """
        with self.lane() as lane:
            yield [lane]

    @abc.abstractmethod
    def close(self) -> None:
        """Wait for the calls that run, and free everything.

        A second time, and in a forked process, it does nothing.

        Raises:
            SessionError: the caller is within a call.
        """


FOREIGN = "this picture was encoded by another predictor; encode it with this one"
