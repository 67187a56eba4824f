"""``tap-export eval``: the public protocols on COCO, LVIS and Visual Genome."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import click

from tap_deploy.cli.evaluate.runs import runs_options
from tap_deploy.cli.evaluate.subjects import Candidate, Subjects, WeightsOptions, weights_options
from tap_deploy.console.options import FILE, NamedPath, json_option, option_group
from tap_deploy.console.progress import stage_bar
from tap_deploy.evaluation.answers import Answers
from tap_deploy.evaluation.captioning import Captioning
from tap_deploy.evaluation.classification import Classification
from tap_deploy.evaluation.instances import COCO, LVIS
from tap_deploy.evaluation.report import Report
from tap_deploy.evaluation.run import EvaluationProtocol, answer_all, scores_of
from tap_deploy.evaluation.segmentation import Segmentation
from tap_deploy.sessions.run_on import RunOn


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The data set, and where answers go.

    Attributes:
        images: folder of the pictures.
        annotations: annotation file.
        limit: evaluate only the first pictures of the file; None for all.
        output: folder of the answers.
        resume: continue from the answers that are there.
    """

    images: pathlib.Path
    annotations: pathlib.Path
    limit: int | None
    output: pathlib.Path
    resume: bool


_subjects_argument = click.argument(
    "subjects", metavar="BUNDLE|CHECKPOINT...", type=NamedPath(), nargs=-1, required=True
)
_data_options = option_group(
    "data",
    DataOptions,
    click.option("--images", type=FILE, required=True, help="Folder of the pictures."),
    click.option("--annotations", type=FILE, required=True, help="Annotation file, JSON."),
    click.option(
        "--limit", type=click.IntRange(min=1), help="Only this many pictures, the first ones."
    ),
    click.option(
        "-o",
        "--output",
        type=FILE,
        default="tap-eval",
        show_default=True,
        help="Folder of the answers, a file of JSON lines per subject.",
    ),
    click.option("--resume", is_flag=True, help="Continue from the answers in --output."),
)
_detections_option = click.option(
    "--detections",
    type=FILE,
    help="Boxes of a detector as COCO results, for AP; without it, only mIoU of 1 and 3 points.",
)


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the argument and the options that all protocols share."""
    decorators = (_subjects_argument, _data_options, runs_options, weights_options, json_option)
    return functools.reduce(lambda made, add: add(made), reversed(decorators), command)


@click.command("coco-seg")
@_options
@_detections_option
def coco_seg_command(detections: pathlib.Path | None, data: DataOptions, **rest: Any) -> None:
    """Mask AP on COCO from the boxes of a detector, and mIoU of 1 and 3 points."""
    _evaluate(
        lambda _: Segmentation.read(
            COCO, data.annotations, data.images, detections, limit=data.limit
        ),
        data=data,
        **rest,
    )


@click.command("lvis-seg")
@_options
@_detections_option
def lvis_seg_command(detections: pathlib.Path | None, data: DataOptions, **rest: Any) -> None:
    """Mask AP on LVIS from the boxes of a detector, and mIoU of 1 and 3 points."""
    _evaluate(
        lambda _: Segmentation.read(
            LVIS, data.annotations, data.images, detections, limit=data.limit
        ),
        data=data,
        **rest,
    )


@click.command("lvis-cls")
@_options
def lvis_cls_command(data: DataOptions, **rest: Any) -> None:
    """AP of names of the ground-truth boxes of LVIS.

    Needs the concepts of LVIS, lvis_1203.pkl, in the bundle or in --concepts.
    """
    _evaluate(
        lambda subjects: Classification.read(
            data.annotations, data.images, subjects.vocabulary(), limit=data.limit
        ),
        data=data,
        **rest,
    )


@click.command("vg-caption")
@_options
def vg_caption_command(data: DataOptions, **rest: Any) -> None:
    """CIDEr-D, METEOR and BLEU of captions of the boxes of Visual Genome.

    With Java, words are split by the PTB tokenizer, as in papers.
    """
    _evaluate(
        lambda _: Captioning.read(data.annotations, data.images, limit=data.limit),
        data=data,
        **rest,
    )


def _evaluate(
    read: Callable[[Subjects], EvaluationProtocol],
    *,
    subjects: tuple[str, ...],
    data: DataOptions,
    run_on: list[RunOn],
    weights: WeightsOptions,
    as_json: bool,
) -> None:
    """Evaluate the subjects of a command line, and print the report."""
    found = Subjects(subjects, weights)
    candidates = found.candidates(run_on)
    report = evaluated(read(found), candidates, data.output, resume=data.resume)
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))


def evaluated(
    protocol: EvaluationProtocol,
    candidates: Sequence[Candidate],
    output: pathlib.Path,
    *,
    resume: bool,
) -> Report:
    """Evaluate subjects one after the other, with a progress bar.

    Args:
        protocol: data set and questions.
        candidates: the subjects; the first is compared with the others.
        output: folder of the answers.
        resume: continue from answers that are there.

    Raises:
        TapError: a subject, a picture or the folder cannot be used.
    """
    with contextlib.ExitStack() as stack:
        answers = {
            candidate.name: stack.enter_context(
                Answers.opened(
                    output,
                    {"protocol": protocol.name, **protocol.key, **candidate.key},
                    resume=resume,
                )
            )
            for candidate in candidates
        }
        with stage_bar("evaluate", len(protocol.pictures) * len(candidates)) as stage:
            for candidate in candidates:
                _answer(protocol, candidate, answers[candidate.name], stage)
        scores = {name: scores_of(protocol, found) for name, found in answers.items()}
    return Report(
        protocol=protocol.name,
        pictures=len(protocol.pictures),
        regions=protocol.num_regions,
        conditions=protocol.conditions,
        scores=scores,
    )


def _answer(
    protocol: EvaluationProtocol,
    candidate: Candidate,
    answers: Answers,
    stage: Callable[[str], None],
) -> None:
    """Load a subject, unless all its answers are there, and ask it."""
    left = [picture for picture in protocol.pictures if picture.id not in answers.done]
    for _ in range(len(protocol.pictures) - len(left)):
        stage(candidate.name)
    if left:
        with candidate.opened() as subject:
            answer_all(protocol, subject, left, answers, functools.partial(stage, candidate.name))
