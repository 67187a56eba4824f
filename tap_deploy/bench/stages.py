"""Workload ``stage``: each stage of a pipeline alone, and end to end."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tap_deploy.bench.tasks import CAPTION, DECODE, ENCODE, END_TO_END, Task
from tap_deploy.chunks import captions_per_call, prompts_per_call
from tap_deploy.config import TapConfig
from tap_deploy.image import Frame
from tap_deploy.masks import masks_from_logits
from tap_deploy.prediction.loaded import DEFAULT_MEMORY_LIMIT_BYTES
from tap_deploy.sessions.gpu.lane import DeviceLane
from tap_deploy.sessions.pipeline import Embeddings, Lane, Pipeline

POINTS = 2


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
    config: TapConfig, pipeline: Pipeline, prompts: Sequence[int], max_new_tokens: int | None
) -> Iterator[list[Task]]:
    """Yield the stages of a pipeline, while holding the lane that they run in.

    Args:
        config: sizes of the model.
        pipeline: the loaded bundle.
        prompts: numbers of regions to time.
        max_new_tokens: maximum number of caption tokens; None for the model's limit. Captions may
            end earlier; ``Task.tokens`` counts the steps that ran.
    """
    inputs = Inputs.random(config, max(prompts))
    with pipeline.lane() as lane:
        bench = _Bench(lane, config, inputs, pipeline, max_new_tokens)
        rows = [bench.task(ENCODE, 1, 0, bench.encode)]
        for count in prompts:
            rows.append(bench.stage(DECODE, count, bench.decode))
        for count in prompts:
            rows.append(bench.stage(CAPTION, count, bench.caption))
        for count in prompts:
            rows.append(bench.stage(END_TO_END, count, bench.end_to_end))
        yield rows


class _Bench:
    """The stages of one lane; calls are chunked as those of ``TapPredictor.predict`` are."""

    def __init__(
        self, lane: Lane, config: TapConfig, inputs: Inputs, pipeline: Pipeline, tokens: int | None
    ) -> None:
        self.lane, self.config, self.inputs, self.max_new_tokens = lane, config, inputs, tokens
        self.decode_size, self.caption_size = chunk_sizes(config, pipeline.max_prompts)
        self.embeddings = lane.encode(inputs.images)
        self.tokens = self.decode(len(inputs.labels))[1]
        self.frame = Frame.for_image(config.image_size, config.image_size, config.image_size)

    def stage(self, kind: str, prompts: int, call: Callable[[int], object]) -> Task:
        steps = 0
        if kind != DECODE:
            steps = steps_of(self.caption(prompts), self.config)
        return self.task(kind, prompts, steps, lambda: call(prompts))

    def task(self, kind: str, prompts: int, tokens: int, call: Callable[[], object]) -> Task:
        if not isinstance(self.lane, DeviceLane):
            return Task(kind=kind, prompts=prompts, tokens=tokens, call=call)
        watch = self.lane.stopwatch()
        return Task(
            kind=kind,
            prompts=prompts,
            tokens=tokens,
            call=lambda: watch.time(call),
            gpu_ms=watch.elapsed_ms,
        )

    def encode(self) -> object:
        embeddings = self.lane.encode(self.inputs.images)
        if isinstance(self.lane, DeviceLane):  # other lanes are synchronous
            self.lane.synchronize()
        return embeddings

    def decode(self, prompts: int) -> tuple[np.ndarray, np.ndarray]:
        """Return mask logits ``[P, S, S]`` and semantic tokens ``[P, C]``."""
        return self._decode(self.embeddings, prompts)

    def _decode(self, embeddings: Embeddings, prompts: int) -> tuple[np.ndarray, np.ndarray]:
        coords, labels = self.inputs.first(prompts)
        parts = [
            self.lane.decode_prompts(embeddings, coords[chunk], labels[chunk])
            for chunk in chunks(prompts, self.decode_size)
        ]
        masks = [part.low_res_masks for part in parts if part.low_res_masks is not None]
        tokens = [part.semantic_tokens for part in parts]
        if len(parts) == 1:
            return masks[0], tokens[0]
        return np.concatenate(masks), np.concatenate(tokens)

    def caption(self, prompts: int) -> np.ndarray:
        return self._caption(self.tokens[:prompts])

    def _caption(self, semantic_tokens: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(0)
        parts = [
            self.lane.caption(
                semantic_tokens[chunk],
                max_new_tokens=self.max_new_tokens,
                temperature=0.0,
                rng=rng,
            )
            for chunk in chunks(len(semantic_tokens), self.caption_size)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def end_to_end(self, prompts: int) -> object:
        """Run all stages: a picture in the model frame to masks and token ids."""
        logits, tokens = self._decode(self.lane.encode(self.inputs.images), prompts)
        return masks_from_logits(logits, self.frame), self._caption(tokens)


def chunk_sizes(config: TapConfig, max_prompts: int | None) -> tuple[int, int]:
    """Return prompts per call of the prompt decoder and of the text decoder, as in ``predict``.

    Args:
        config: sizes of the model.
        max_prompts: limit of the pipeline; None to derive them from the default memory limit.
    """
    if max_prompts is not None:
        return max_prompts, max_prompts
    return (
        prompts_per_call(config, POINTS, DEFAULT_MEMORY_LIMIT_BYTES),
        captions_per_call(config, DEFAULT_MEMORY_LIMIT_BYTES),
    )


def chunks(count: int, size: int) -> list[slice]:
    """Return slices of at most ``size`` that cover 0 to ``count``."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def steps_of(ids: np.ndarray, config: TapConfig) -> int:
    """Return the length of the longest caption of ids ``[P, positions]``, tokens with EOS."""
    return int((ids[:, 1:] != config.pad_id).sum(axis=1).max(initial=0))
