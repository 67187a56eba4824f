"""Options of the verdict on INT8, which ``quantize`` and ``verdict`` share."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.console.extras import require_export_extra
from tap_deploy.console.options import FILE, option_group

if TYPE_CHECKING:
    from tap_deploy.engines.verdict.judge import VerdictOptions
    from tap_deploy.engines.verdict.speed import OtherRuntime, SpeedInputs

SHARE = click.FloatRange(0, 1)
EAGER = "PyTorch eager fp32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """How INT8 is judged: on which pictures, against which limits; see ``VerdictOptions``.

    Attributes:
        evaluation_data: pictures that calibration does not see: a folder, a picture, a list.
        evaluation_samples: maximum number of them.
        checkpoint: weights of the bundle, to time PyTorch eager in the same run.
        min_miou: minimum mean IoU of INT8 and fp32 masks.
        min_top1: minimum share of regions that keep their most likely concept.
        min_captions: minimum share of identical captions.
        min_calibration_pictures: minimum number of calibration pictures.
        min_speedup: minimum speedup over the float graph; 0 takes INT8 at any speed.
        speed: measure speed; if False, only accuracy decides.
    """

    evaluation_data: pathlib.Path | None
    evaluation_samples: int
    checkpoint: pathlib.Path | None
    min_miou: float
    min_top1: float
    min_captions: float
    min_calibration_pictures: int
    min_speedup: float
    speed: bool

    def verdict(self, *, backend: str, threads: int | None) -> VerdictOptions:
        """Return the options of a verdict for a backend."""
        from tap_deploy.engines.verdict.judge import VerdictOptions
        from tap_deploy.engines.verdict.speed import SpeedOptions
        from tap_deploy.engines.verdict.verdict import Floors

        return VerdictOptions(
            backend=backend,
            floors=Floors(
                mask_iou=self.min_miou,
                concept_top1=self.min_top1,
                captions_identical=self.min_captions,
            ),
            speed=SpeedOptions() if self.speed else None,
            min_speedup=self.min_speedup,
            min_calibration_pictures=self.min_calibration_pictures,
            threads=threads,
        )


judge_options = option_group(
    "judging",
    JudgeOptions,
    click.option(
        "--evaluation-data",
        type=FILE,
        help="Evaluation pictures, a folder, a picture or a list; calibration pictures are "
        "excluded.",
    ),
    click.option(
        "--evaluation-samples",
        type=click.IntRange(min=1),
        default=64,
        show_default=True,
        help="Maximum number of evaluation pictures.",
    ),
    click.option(
        "--checkpoint",
        type=FILE,
        help="Weights of the bundle, to time PyTorch eager in the same run. Needs torch.",
    ),
    click.option(
        "--min-miou",
        type=SHARE,
        default=0.97,
        show_default=True,
        help="Fail below this mean IoU of INT8 and fp32 masks.",
    ),
    click.option(
        "--min-top1",
        type=SHARE,
        default=0.98,
        show_default=True,
        help="Fail if a smaller share of regions keeps its most likely concept.",
    ),
    click.option(
        "--min-captions",
        type=SHARE,
        default=0.95,
        show_default=True,
        help="Fail if a smaller share of captions is identical.",
    ),
    click.option(
        "--min-calibration-pictures",
        type=click.IntRange(min=1),
        default=8,
        show_default=True,
        help="Fail if calibration used fewer pictures.",
    ),
    click.option(
        "--min-speedup",
        type=click.FloatRange(min=0),
        default=1.05,
        show_default=True,
        help="Keep the float graph if INT8 is not faster by this factor; 0 takes INT8 at any "
        "speed.",
    ),
    click.option(
        "--speed/--no-speed",
        default=True,
        show_default=True,
        help="Measure speed; with --no-speed, only accuracy decides.",
    ),
)


def eager_runtime(
    bundle: Bundle, checkpoint: pathlib.Path | None, threads: int | None
) -> Mapping[str, OtherRuntime]:
    """Return PyTorch as a further runtime to time, if there are weights.

    Raises:
        CheckpointError: the weights do not fit the bundle.
        MissingDependencyError: torch is not installed.
    """
    if checkpoint is None:
        return {}
    require_export_extra()
    import torch

    from tap_deploy.engines.verdict.speed import WHOLE
    from tap_deploy.image import load_image
    from tap_deploy.reference.checkpoint import load_checkpoint
    from tap_deploy.reference.eager import eager_calls
    from tap_deploy.reference.predictor import ReferencePredictor

    if threads is not None:
        torch.set_num_threads(threads)
    sizes = bundle.manifest.weights_config
    model, _ = load_checkpoint(checkpoint, sizes, image_size=bundle.config.image_size)
    vocabulary, tokenizer = bundle.vocabulary(), bundle.tokenizer()

    def calls(inputs: SpeedInputs) -> Mapping[str, Callable[[], object]]:
        found = eager_calls(
            model,
            images=inputs.images,
            image_embeddings=inputs.image_embeddings,
            point_coords=inputs.point_coords,
            point_labels=inputs.point_labels,
            semantic_tokens=inputs.semantic_tokens,
            num_tokens=inputs.num_tokens,
        )
        if vocabulary is not None and tokenizer is not None:
            subject, case = ReferencePredictor(model, vocabulary, tokenizer), inputs.case
            found[WHOLE] = lambda: subject.predict(load_image(case.image), prompts=case.prompts)
        return found

    return {EAGER: calls}
