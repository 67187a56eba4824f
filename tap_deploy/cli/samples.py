"""``tap-export samples``: runs a bundle of the demo model on its sample pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib

import click
import numpy as np
from PIL import Image

from tap_deploy.console.options import FILE, bundle_argument, json_option, runtime_options
from tap_deploy.console.progress import stage_bar
from tap_deploy.demo_model import Sample, load_samples
from tap_deploy.errors import InputError
from tap_deploy.predictor import TapPredictor
from tap_deploy.regions import Regions
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.storage.files import atomic_file, new_folder

_SCALE = 4  # of the overlays: 1024 pixels from 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleAnswer:
    """An answer and the ground truth; ``mask_iou`` is 0..1, at the size of the picture."""

    picture: str
    prompt: str
    mask_iou: float
    name: str
    right_name: str
    caption: str
    right_caption: str


@click.command("samples")
@bundle_argument
@click.option(
    "--overlays",
    type=FILE,
    help="Folder for overlays, a PNG per picture; existing files are replaced.",
)
@runtime_options
@json_option
def samples_command(
    bundle: str, overlays: pathlib.Path | None, run_on: RunOn, as_json: bool
) -> None:
    """Run BUNDLE of the demo model on its sample pictures.

    Prints answers and ground truth. A quick check that a device computes sensible results;
    eval demo measures how good the model is.
    """
    answers = answers_to_samples(bundle, run_on, overlays)
    click.echo(_as_json(answers) if as_json else describe(answers))


def answers_to_samples(
    bundle: str, run_on: RunOn, overlays: pathlib.Path | None = None
) -> list[SampleAnswer]:
    """Run a bundle of the demo model on all sample pictures.

    Args:
        bundle: path of the bundle.
        run_on: what runs the graphs.
        overlays: folder for a PNG per picture with its regions; None for none.

    Raises:
        InputError: the folder cannot be written, or the bundle has no concepts or tokenizer.
        TapError: the bundle cannot be used, or the backend failed.
    """
    samples, answers = load_samples(), []
    with (
        contextlib.nullcontext() if overlays is None else new_folder(overlays),
        stage_bar("samples", len(samples)) as stage,
        TapPredictor.from_bundle(bundle, **dataclasses.asdict(run_on)) as predictor,
    ):
        for sample in samples:
            stage(sample.picture.name)
            with Image.open(sample.picture) as opened:
                picture = np.asarray(opened.convert("RGB"))
            regions = predictor.predict(picture, prompts=sample.prompts())
            answers += sample_answers(sample, regions)
            if overlays is not None:
                with atomic_file(overlays / sample.picture.name) as partial:
                    regions.visualize(picture, _SCALE).save(partial, "PNG")
    return answers


def sample_answers(sample: Sample, regions: Regions) -> list[SampleAnswer]:
    """Return the answers to a sample with the ground truth.

    Raises:
        InputError: the bundle has no concepts or no tokenizer.
    """
    from tap_deploy.masks import mask_iou

    if regions.masks is None or regions.concepts is None or regions.captions is None:
        raise InputError("the bundle has no concepts or no tokenizer; export tap_demo with both")
    return [
        SampleAnswer(
            picture=sample.picture.name,
            prompt=truth.prompt,
            mask_iou=round(mask_iou(mask, truth.mask), 3),
            name=concepts[0][0],
            right_name=truth.name,
            caption=caption,
            right_caption=truth.caption,
        )
        for truth, mask, concepts, caption in zip(
            sample.regions, regions.masks, regions.concepts, regions.captions, strict=True
        )
    ]


def describe(answers: list[SampleAnswer]) -> str:
    """Return one line per answer, and a second one with the ground truth if it is wrong."""
    lines = []
    width = 2 + max(len(name) for answer in answers for name in (answer.name, answer.right_name))
    for answer in answers:
        head = f"{answer.picture:8}{answer.prompt:8}mask IoU {answer.mask_iou:.2f}  "
        lines.append(f"{head}{answer.name:{width}}{answer.caption}")
        if (answer.name, answer.caption) != (answer.right_name, answer.right_caption):
            expected = f"{answer.right_name:{width}}{answer.right_caption}"
            lines.append(f"{'expected:  ':>{len(head)}}{expected}")
    names = sum(answer.name == answer.right_name for answer in answers)
    captions = sum(answer.caption == answer.right_caption for answer in answers)
    masks = sum(answer.mask_iou for answer in answers) / len(answers)
    lines.append(
        f"{len(answers)} regions: {names} names and {captions} captions correct, "
        f"mean mask IoU {masks:.2f}"
    )
    return "\n".join(lines)


def _as_json(answers: list[SampleAnswer]) -> str:
    return json.dumps([dataclasses.asdict(answer) for answer in answers], indent=2)
