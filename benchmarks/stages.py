"""The stages to time: each stage of a pipeline, and end to end."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.config import TapConfig
from tap_deploy.image import Frame
from tap_deploy.masks import masks_from_logits
from tap_deploy.sessions.gpu.lane import DeviceLane
from tap_deploy.sessions.pipeline import DecodedPrompts, Lane, Pipeline

END_TO_END, ENCODE, DECODE, CAPTION = "end to end", "encode", "decode", "caption"
POINTS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage to time.

    Attributes:
        kind: ``encode``, ``decode``, ``caption`` or ``end to end``.
        prompts: regions per call; 1 for the encoder.
        tokens: steps of the text decoder after the prefix; 0 if it does not run.
        call: runs the stage once, synchronously.
    """

    kind: str
    prompts: int
    tokens: int
    call: Callable[[], object]

    @property
    def name(self) -> str:
        """Name of the stage with its sizes."""
        count = "1 image" if self.kind == ENCODE else f"P={self.prompts}"
        return f"{self.kind} {count}" + (f", {self.tokens} tokens" if self.tokens else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """A random picture and random boxes; the work does not depend on the content.

    Attributes:
        images: picture in the model frame, uint8 ``[1, S, S, 3]``.
        coords: box corners XY, pixels of the model frame, float32 ``[P, 2, 2]``.
        labels: labels of the two corners, int32 ``[P, 2]``.
    """

    images: np.ndarray
    coords: np.ndarray
    labels: np.ndarray

    @classmethod
    def random(cls, config: TapConfig, prompts: int) -> Inputs:
        """Return inputs for a model, drawn with a fixed seed."""
        rng = np.random.default_rng(0)
        size = config.image_size
        corners = np.sort(rng.uniform(0, size, (prompts, 2, POINTS)), axis=2)
        return cls(
            images=rng.integers(0, 256, (1, size, size, 3), np.uint8),
            coords=np.ascontiguousarray(corners.transpose(0, 2, 1), np.float32),
            labels=np.tile(np.array([2, 3], np.int32), (prompts, 1)),
        )

    def first(self, prompts: int) -> tuple[np.ndarray, np.ndarray]:
        """Return coordinates and labels of the first ``prompts`` prompts."""
        return self.coords[:prompts], self.labels[:prompts]


@contextlib.contextmanager
def stages(
    bundle: Bundle, pipeline: Pipeline, prompts: Sequence[int], max_new_tokens: int | None
) -> Iterator[list[Stage]]:
    """Yield the stages of a pipeline, while holding the lane that they run in.

    Args:
        bundle: the bundle.
        pipeline: the loaded bundle.
        prompts: numbers of regions to time.
        max_new_tokens: maximum number of caption tokens; None for the model's limit. Captions may
            end earlier; ``Stage.tokens`` counts the steps that ran.
    """
    config, inputs = bundle.config, Inputs.random(bundle.config, max(prompts))
    with pipeline.lane() as lane:
        bench = _Bench(lane, config, inputs, max_new_tokens)
        rows = [Stage(kind=ENCODE, prompts=1, tokens=0, call=bench.encode)]
        for count in prompts:
            rows.append(bench.stage(DECODE, count, bench.decode))
        for count in prompts:
            rows.append(bench.stage(CAPTION, count, bench.caption))
        for count in prompts:
            rows.append(bench.stage(END_TO_END, count, bench.end_to_end))
        yield rows


class _Bench:
    """The stages of one lane."""

    def __init__(
        self, lane: Lane, config: TapConfig, inputs: Inputs, max_new_tokens: int | None
    ) -> None:
        self.lane, self.config, self.inputs = lane, config, inputs
        self.max_new_tokens = max_new_tokens
        self.embeddings = lane.encode(inputs.images)
        self.tokens = self.decode(len(inputs.labels)).semantic_tokens
        self.frame = Frame.for_image(config.image_size, config.image_size, config.image_size)

    def stage(self, kind: str, prompts: int, call: Callable[[int], object]) -> Stage:
        steps = 0
        if kind != DECODE:
            steps = steps_of(self.caption(prompts), self.config)
        return Stage(kind=kind, prompts=prompts, tokens=steps, call=lambda: call(prompts))

    def encode(self) -> object:
        embeddings = self.lane.encode(self.inputs.images)
        if isinstance(self.lane, DeviceLane):  # other lanes are synchronous
            self.lane.synchronize()
        return embeddings

    def decode(self, prompts: int) -> DecodedPrompts:
        return self.lane.decode_prompts(self.embeddings, *self.inputs.first(prompts))

    def caption(self, prompts: int) -> np.ndarray:
        return self._caption(self.tokens[:prompts])

    def _caption(self, semantic_tokens: np.ndarray) -> np.ndarray:
        return self.lane.caption(
            semantic_tokens,
            max_new_tokens=self.max_new_tokens,
            temperature=0.0,
            rng=np.random.default_rng(0),
        )

    def end_to_end(self, prompts: int) -> object:
        """Run all stages: a picture in the model frame to masks and token ids."""
        embeddings = self.lane.encode(self.inputs.images)
        decoded = self.lane.decode_prompts(embeddings, *self.inputs.first(prompts))
        ids = self._caption(decoded.semantic_tokens)
        return masks_from_logits(decoded.low_res_masks, self.frame), ids


def steps_of(ids: np.ndarray, config: TapConfig) -> int:
    """Return the length of the longest caption of ids ``[P, positions]``, tokens with EOS."""
    return int((ids[:, 1:] != config.pad_id).sum(axis=1).max(initial=0))
