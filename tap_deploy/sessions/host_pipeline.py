"""The pipeline for backends that work on host arrays."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping

import numpy as np

from tap_deploy import graphs
from tap_deploy.config import TapConfig
from tap_deploy.errors import InputError
from tap_deploy.masks import mask_rows, request_answers, request_candidates
from tap_deploy.sessions.caption_writer import OnIds
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.host_captioner import Captioner
from tap_deploy.sessions.lane_pool import LanePool
from tap_deploy.sessions.pipeline import (
    CLOSED,
    FOREIGN,
    Candidates,
    DecodedPrompts,
    Embeddings,
    Lane,
    Pipeline,
)


@dataclasses.dataclass(frozen=True, eq=False)
class HostEmbeddings(Embeddings):
    """Image embeddings in a host array.

    Attributes:
        array: embeddings in the float dtype of the graph, ``[1, C, grid, grid]``.
    """

    array: np.ndarray

    def numpy(self) -> np.ndarray:
        """Return float32 ``[1, C, grid, grid]``."""
        return self.array.astype(np.float32, copy=False)


class HostPipeline(Pipeline):
    """A pipeline over three sessions; any number of threads may call it at once."""

    def __init__(self, sessions: Mapping[str, Session], config: TapConfig) -> None:
        self._sessions = dict(sessions)
        self._pool = LanePool([HostLane(self._sessions, config)], CLOSED, shared=True)

    def lane(self) -> contextlib.AbstractContextManager[Lane]:
        """Return the shared lane without waiting."""
        return self._pool.taken()

    def close(self) -> None:
        """Wait for running calls, then close the sessions."""
        if self._pool.close():
            for session in self._sessions.values():
                session.close()


class HostLane(Lane):
    """Runs the sessions on host arrays; thread-safe, as the sessions are."""

    def __init__(self, sessions: Mapping[str, Session], config: TapConfig) -> None:
        self._sessions, self.config = sessions, config
        self.captioner = Captioner(sessions[graphs.TEXT_DECODER], config)

    def encode_batch(self, images: np.ndarray) -> list[Embeddings]:
        """Run the image encoder once."""
        outputs = self._sessions[graphs.IMAGE_ENCODER].run({graphs.IMAGES: images})
        embeddings = outputs[graphs.IMAGE_EMBEDDINGS]
        return [HostEmbeddings(embeddings[index : index + 1]) for index in range(len(images))]

    def decode_prompts(
        self, embeddings: Embeddings, coords: np.ndarray, labels: np.ndarray, *, masks: bool = True
    ) -> DecodedPrompts:
        """Run the prompt decoder for the token that answers each prompt."""
        request, rows = request_answers(len(labels)), mask_rows(len(labels), masks=masks)
        outputs = self._decode(embeddings, coords, labels, request, rows)
        if not masks:
            del outputs[graphs.LOW_RES_MASKS]
        return DecodedPrompts.from_outputs(outputs)

    def decode_candidates(
        self, embeddings: Embeddings, coords: np.ndarray, labels: np.ndarray
    ) -> Candidates:
        """Run the prompt decoder once for all tokens."""
        request = request_candidates(len(labels), self.config.num_mask_tokens)
        outputs = self._decode(embeddings, coords, labels, request, mask_rows(len(labels)))
        return Candidates.from_outputs(outputs)

    def _decode(
        self,
        embeddings: Embeddings,
        coords: np.ndarray,
        labels: np.ndarray,
        request: np.ndarray,
        rows: np.ndarray,
    ) -> dict[str, np.ndarray]:
        if not isinstance(embeddings, HostEmbeddings):
            raise InputError(FOREIGN)
        return self._sessions[graphs.PROMPT_DECODER].run(
            {
                graphs.IMAGE_EMBEDDINGS: embeddings.array,
                graphs.POINT_COORDS: coords,
                graphs.POINT_LABELS: labels,
                graphs.MASK_REQUEST: request,
                graphs.MASK_ROWS: rows,
            }
        )

    def caption(
        self,
        semantic_tokens: np.ndarray,
        *,
        max_new_tokens: int | None,
        temperature: float,
        rng: np.random.Generator,
        on_ids: OnIds | None = None,
    ) -> np.ndarray:
        """Write captions with ``Captioner``."""
        return self.captioner.generate(
            semantic_tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            rng=rng,
            on_ids=on_ids,
        )

    def record_captions(self, rows: int, *, draws: bool) -> None:
        """Do nothing; there are no CUDA graphs to record."""
