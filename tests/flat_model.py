"""A stand-in for a model that segments flat colours perfectly, so that answers are known."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np

from tap_deploy import TapPredictor, Vocabulary
from tap_deploy.config import BOS_ID, TapConfig
from tap_deploy.sessions.pipeline import Candidates, DecodedPrompts, Embeddings, Lane, Pipeline

NAMES = ("ground", "ball", "box", "stick")
COLORS = np.array([[20, 20, 20], [250, 0, 0], [0, 250, 0], [0, 0, 250]])  # RGB, by name
SCORES = np.array([0.3, 0.9, 0.8, 0.7], np.float32)  # predicted IoU, by name
LOGIT = 4.0


@dataclasses.dataclass(frozen=True, eq=False)
class FlatEmbeddings(Embeddings):
    """Number of the colour of each pixel of the model frame, int [S, S]."""

    numbers: np.ndarray

    def numpy(self) -> np.ndarray:
        return self.numbers


class FlatLane(Lane):
    """Masks are the pixels of the colour at the point; everything it did is written down."""

    def __init__(self, config: TapConfig) -> None:
        self.config = config
        self.decoded: list[int] = []
        self.captioned: list[int] = []

    def encode_batch(self, images):
        colors = images[..., ::-1].astype(int)
        distance = np.abs(colors[..., None, :] - COLORS).sum(axis=-1)
        return [FlatEmbeddings(numbers) for numbers in distance.argmin(axis=-1)]

    def decode_prompts(self, embeddings, coords, labels, *, masks=True):
        self.decoded.append(len(coords))
        size = self.config.low_res_mask_size
        cell = self.config.image_size // size
        coarse = embeddings.numbers[cell // 2 :: cell, cell // 2 :: cell]
        x, y = coords[:, 0].astype(int).T
        numbers = embeddings.numbers[y, x]
        inside = coarse == numbers[:, None, None]
        return DecodedPrompts(
            low_res_masks=np.where(inside, LOGIT, -LOGIT).astype(np.float32),
            iou_predictions=SCORES[numbers],
            mask_index=np.ones(len(coords), np.int64),
            semantic_tokens=np.zeros((len(coords), self.config.image_embed_dim), np.float32),
            semantic_embeddings=np.eye(self.config.sem_embed_dim, dtype=np.float32)[numbers],
        )

    def decode_candidates(self, embeddings, coords, labels) -> Candidates:
        raise NotImplementedError

    def caption(self, semantic_tokens, *, max_new_tokens, temperature, rng, on_ids=None):
        self.captioned.append(len(semantic_tokens) if max_new_tokens != 0 else 0)
        ids = np.full((len(semantic_tokens), self.config.text_seq_len - 1), self.config.pad_id)
        ids[:, 0] = BOS_ID
        return ids

    def record_captions(self, rows, *, draws) -> None:
        raise NotImplementedError


class FlatPipeline(Pipeline):
    """A pipeline of one lane."""

    def __init__(self, config: TapConfig, max_prompts: int | None = None) -> None:
        self.the_lane, self.max_prompts = FlatLane(config), max_prompts

    @contextlib.contextmanager
    def lane(self) -> Iterator[Lane]:
        yield self.the_lane

    def close(self) -> None:
        pass


def flat_vocabulary(config: TapConfig) -> Vocabulary:
    """Return the names, whose embeddings are unit vectors; a right name has almost all of 1."""
    weights = np.eye(config.sem_embed_dim, len(NAMES), dtype=np.float32) * np.float32(20)
    return Vocabulary(weights=weights, names=NAMES)


def flat_predictor(config: TapConfig, max_prompts: int | None = None) -> TapPredictor:
    """Return a predictor of flat colours."""
    pipeline = FlatPipeline(config, max_prompts)
    return TapPredictor(pipeline, config, vocabulary=flat_vocabulary(config))


def painted(height: int, width: int, **boxes: tuple[int, int, int, int]) -> np.ndarray:
    """Return a picture uint8 [H, W, 3] with a rectangle XYXY per name."""
    picture = np.empty((height, width, 3), np.uint8)
    picture[:] = COLORS[0]
    for name, (x0, y0, x1, y1) in boxes.items():
        picture[y0:y1, x0:x1] = COLORS[NAMES.index(name)]
    return picture
