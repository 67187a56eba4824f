"""Golden samples on the path that a predictor takes: one lane, a masked cache, replayed steps.

Graph by graph, ``verify`` feeds every graph with host arrays and the exact past. On a GPU a
predictor does neither: it shows the text decoder the whole cache, pads its rows, and replays what
it recorded. So a self-test runs the pipeline, too: once to record, and again to replay.

What a backend copied once in place of reading it each time is right as long as it does not change.
So between the two come the same prompts in reverse, whose answers are known, and the mirrored
picture, whose answers are not, but must be others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from tap_deploy import graphs
from tap_deploy.bundle.golden import GoldenSample
from tap_deploy.sessions.caption_writer import blank_after_eos
from tap_deploy.sessions.pipeline import Pipeline
from tap_deploy.verify.comparison import Check
from tap_deploy.verify.recorder import CheckRecorder
from tap_deploy.verify.tolerances import CAPTION_IDS, MASK_INDEX, PROMPT_OUTPUTS

PIPELINE = "pipeline"
RUNS = ("first run", "reversed prompts", "replayed")
CHECKS_PER_RUN = len(PROMPT_OUTPUTS) + len((MASK_INDEX, CAPTION_IDS))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Expected:
    """What a pipeline must give, and the scores that its choices are made from.

    prompt_outputs: name -> float32 ``[P, M, ...]``, of every mask token.
    logits: float32 ``[P, steps, V]`` on the golden captions; only read where tokens may differ.
    """

    prompt_outputs: Mapping[str, np.ndarray]
    logits: np.ndarray

    @classmethod
    def from_sample(cls, sample: GoldenSample) -> Expected:
        """Return what the reference gives; for precisions that are bound to its choices."""
        outputs = {name: getattr(sample, name) for name in PROMPT_OUTPUTS}
        return cls(prompt_outputs=outputs, logits=sample.logits)


def check_pipeline(
    pipeline: Pipeline,
    sample: GoldenSample,
    expected: Expected,
    pad_id: int,
    recorder: CheckRecorder,
) -> None:
    """Run a sample through a pipeline, others after it, and again; compare what comes out.

    Args:
        pipeline: where it runs.
        sample: pictures, of which the first is taken, prompts, and golden choices.
        expected: see there.
        pad_id: what follows a caption's EOS.
        recorder: makes the comparisons, under the graph name ``pipeline``. The mirrored picture
            is only mentioned if its masks are those of the picture itself.

    Raises:
        InputError: the pipeline takes fewer points than the prompts have.
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
    recorder: CheckRecorder,
    name: str,
) -> np.ndarray:
    """Run and compare once; return the chosen masks, ``[P, ...]``."""
    decoded, index, ids = _run(pipeline, sample)
    rows = np.arange(len(index))
    for tensor, actual in decoded.items():
        # Every token is known, so that of a choice that is as good can be held against its own.
        wanted = expected.prompt_outputs[tensor][rows, index]
        recorder.add(PIPELINE, tensor, name, actual, wanted)
    iou = expected.prompt_outputs[graphs.IOU_PREDICTIONS]
    recorder.add_choice(PIPELINE, MASK_INDEX, name, index, sample.mask_index, iou)
    _check_captions(sample, expected, pad_id, recorder, name, index, ids)
    return decoded[graphs.LOW_RES_MASKS]


def _reversed(sample: GoldenSample, expected: Expected) -> tuple[GoldenSample, Expected]:
    """Return the prompts from last to first: what is known of each does not depend on others."""
    names = ("point_coords", "point_labels", "mask_index", "caption_ids")
    turned = {name: np.ascontiguousarray(getattr(sample, name)[::-1]) for name in names}
    outputs = {name: array[::-1] for name, array in expected.prompt_outputs.items()}
    return (
        dataclasses.replace(sample, **turned),
        Expected(prompt_outputs=outputs, logits=expected.logits[::-1]),
    )


def _check_mirrored(
    pipeline: Pipeline, sample: GoldenSample, masks: np.ndarray, recorder: CheckRecorder
) -> None:
    """Demand other masks of another picture."""
    images = np.ascontiguousarray(sample.images[:, :, ::-1])
    decoded, _, _ = _run(pipeline, dataclasses.replace(sample, images=images))
    actual = decoded[graphs.LOW_RES_MASKS]
    if np.array_equal(actual, masks) and not np.array_equal(images, sample.images):
        recorder.record(
            Check(
                graph=PIPELINE,
                tensor=graphs.LOW_RES_MASKS,
                sample=f"{sample.name} mirrored picture",
                shape=actual.shape,
                max_abs=np.inf,
                max_rel=np.inf,
                tolerance=0.0,
                note="the masks of another picture: the backend does not read its inputs anew",
            )
        )


def _check_captions(
    sample: GoldenSample,
    expected: Expected,
    pad_id: int,
    recorder: CheckRecorder,
    name: str,
    index: np.ndarray,
    ids: np.ndarray,
) -> None:
    wanted = blank_after_eos(sample.caption_ids, pad_id)
    if recorder.tolerances[CAPTION_IDS].max == 0:
        recorder.add(PIPELINE, CAPTION_IDS, name, ids, wanted)
        return
    # Another mask has another caption, which no sample holds; whether the mask may be another
    # one was judged above.
    same = index == sample.mask_index
    recorder.add_captions(PIPELINE, name, ids[same], wanted[same], expected.logits[same])


def _run(
    pipeline: Pipeline, sample: GoldenSample
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Return chosen outputs float32 ``[P, ...]``, mask index and ids, as a predictor gets them."""
    count = len(sample.point_labels)
    size = pipeline.max_prompts or count
    chunks = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    with pipeline.lane() as lane:
        embeddings = lane.encode(sample.images[:1])
        parts = [
            lane.decode_prompts(embeddings, sample.point_coords[chunk], sample.point_labels[chunk])
            for chunk in chunks
        ]
        rng = np.random.default_rng(0)  # nothing is drawn
        ids = [
            lane.caption(part.semantic_tokens, max_new_tokens=None, temperature=0.0, rng=rng)
            for part in parts
        ]
    decoded = {n: np.concatenate([getattr(part, n) for part in parts]) for n in PROMPT_OUTPUTS}
    return decoded, np.concatenate([part.mask_index for part in parts]), np.concatenate(ids)
