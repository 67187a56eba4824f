"""Comparison of a whole pipeline's outputs with golden samples.

``graph_check`` gives every graph host arrays and a cache of the exact length. A predictor on a GPU
instead gives the text decoder the whole cache, pads rows, and replays recorded steps. The self-test
therefore also runs the pipeline: once to record, and again to replay.

A backend that caches an input instead of reading it in each run gives correct results until the
input changes. Two more runs in between detect this: the same prompts in reverse order, with known
results, and the mirrored picture, whose results are unknown but must differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tap_deploy import graphs
from tap_deploy.bundle.golden import GoldenSample
from tap_deploy.sessions.caption_writer import blank_after_eos
from tap_deploy.sessions.pipeline import Pipeline
from tap_deploy.verify.comparison import Comparison
from tap_deploy.verify.recorder import ComparisonRecorder, choice_margins
from tap_deploy.verify.tolerances import MASK_INDEX, PROMPT_OUTPUTS

PIPELINE = "pipeline"
RUNS = ("first run", "reversed prompts", "replayed")
CHECKS_PER_RUN = len(PROMPT_OUTPUTS) + 2  # and mask index and caption


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Expected:
    """Expected outputs of a pipeline, with the scores behind its choices.

    Attributes:
        prompt_outputs: output name -> value for every mask token, float32 ``[P, M, ...]``.
        logits: logits on the golden captions, float32 ``[P, steps, V]``.
    """

    prompt_outputs: Mapping[str, np.ndarray]
    logits: np.ndarray


def check_pipeline(
    pipeline: Pipeline,
    sample: GoldenSample,
    expected: Expected,
    pad_id: int,
    recorder: ComparisonRecorder,
) -> None:
    """Run a sample, its variations, and the sample again through a pipeline; compare the outputs.

    Args:
        pipeline: pipeline to check.
        sample: golden sample; only its first picture is used.
        expected: expected outputs.
        pad_id: padding id after EOS.
        recorder: records the comparisons under the graph name ``pipeline``. The mirrored picture
            is recorded only if it fails, that is, if its masks equal those of the original.

    Raises:
        InputError: the prompts have more points than the pipeline takes.
        SessionError: the backend failed.
    """
    first, turned, again = (f"{sample.name} {run}" for run in RUNS)
    masks = _check_run(pipeline, sample, expected, pad_id, recorder, first)
    _check_run(pipeline, *_reversed(sample, expected), pad_id, recorder, turned)
    _check_mirrored(pipeline, sample, masks, recorder)
    _check_run(pipeline, sample, expected, pad_id, recorder, again)


def _check_run(
    pipeline: Pipeline,
    sample: GoldenSample,
    expected: Expected,
    pad_id: int,
    recorder: ComparisonRecorder,
    name: str,
) -> np.ndarray:
    """Run and compare once; return the selected masks, ``[P, ...]``."""
    decoded, index, ids = _run(pipeline, sample)
    rows = np.arange(len(index))
    for tensor, actual in decoded.items():
        # Expected outputs cover every mask token, so a nearly tied choice has its own.
        outputs = expected.prompt_outputs[tensor]
        wanted = outputs[rows, np.clip(index, 0, outputs.shape[1] - 1)]
        recorder.add(PIPELINE, tensor, name, actual, wanted)
    iou = expected.prompt_outputs[graphs.IOU_PREDICTIONS]
    margins = choice_margins(iou, index, sample.mask_index)
    scale = float(np.abs(iou).max())
    recorder.add_choice(PIPELINE, MASK_INDEX, name, index, sample.mask_index, margins, scale)
    _check_captions(sample, expected, pad_id, recorder, name, index, ids)
    return decoded[graphs.LOW_RES_MASKS]


def _reversed(sample: GoldenSample, expected: Expected) -> tuple[GoldenSample, Expected]:
    """Return the sample and its expected outputs with the prompts in reverse order."""
    names = ("point_coords", "point_labels", "mask_index", "caption_ids")
    turned: dict[str, Any] = {
        name: np.ascontiguousarray(getattr(sample, name)[::-1]) for name in names
    }
    outputs = {name: array[::-1] for name, array in expected.prompt_outputs.items()}
    return (
        dataclasses.replace(sample, **turned),
        Expected(prompt_outputs=outputs, logits=expected.logits[::-1]),
    )


def _check_mirrored(
    pipeline: Pipeline, sample: GoldenSample, masks: np.ndarray, recorder: ComparisonRecorder
) -> None:
    """Comparison that the mirrored picture has different masks."""
    images = np.ascontiguousarray(sample.images[:, :, ::-1])
    decoded, _, _ = _run(pipeline, dataclasses.replace(sample, images=images))
    actual = decoded[graphs.LOW_RES_MASKS]
    if np.array_equal(actual, masks) and not np.array_equal(images, sample.images):
        recorder.record(
            Comparison(
                graph=PIPELINE,
                tensor=graphs.LOW_RES_MASKS,
                sample=f"{sample.name} mirrored picture",
                shape=actual.shape,
                max_abs=np.inf,
                max_rel=np.inf,
                tolerance=0.0,
                note="a mirrored picture got the same masks: the backend reuses old inputs",
            )
        )


def _check_captions(
    sample: GoldenSample,
    expected: Expected,
    pad_id: int,
    recorder: ComparisonRecorder,
    name: str,
    index: np.ndarray,
    ids: np.ndarray,
) -> None:
    wanted = blank_after_eos(sample.caption_ids, pad_id)
    # The caption of another mask is not in the sample; the choice of the mask was compared above.
    same = index == sample.mask_index
    recorder.add_captions(PIPELINE, name, ids[same], wanted[same], expected.logits[same])


def _run(
    pipeline: Pipeline, sample: GoldenSample
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Return outputs float32 ``[P, ...]``, mask index and caption ids, as a predictor gets them."""
    count = len(sample.point_labels)
    size = pipeline.max_prompts or count
    chunks = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    with pipeline.lane() as lane:
        embeddings = lane.encode(sample.images[:1])
        parts = [
            lane.decode_prompts(embeddings, sample.point_coords[chunk], sample.point_labels[chunk])
            for chunk in chunks
        ]
        rng = np.random.default_rng(0)  # unused: decoding is greedy
        ids = [
            lane.caption(part.semantic_tokens, max_new_tokens=None, temperature=0.0, rng=rng)
            for part in parts
        ]
    decoded = {n: np.concatenate([getattr(part, n) for part in parts]) for n in PROMPT_OUTPUTS}
    return decoded, np.concatenate([part.mask_index for part in parts]), np.concatenate(ids)
