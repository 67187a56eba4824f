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
from tap_deploy.evaluation.answers import Answers, Shard
from tap_deploy.evaluation.captioning import Captioning
from tap_deploy.evaluation.classification import Classification
from tap_deploy.evaluation.data_pictures import DataPicture
from tap_deploy.evaluation.instances import COCO, LVIS
from tap_deploy.evaluation.report import report_of
from tap_deploy.evaluation.run import EvaluationProtocol, answer_all
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
        shard: the part of the pictures to answer, as ``I/N``; None for all, and scores.
    """

    images: pathlib.Path
    annotations: pathlib.Path
    limit: int | None
    output: pathlib.Path
    resume: bool
    shard: str | None


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
    click.option(
        "--shard",
        metavar="I/N",
        help="Answer the I-th (from 0) of N parts, without scores: a process per device. Then "
        "score with --resume and without --shard.",
    ),
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
@_detections_option
@_options
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
@_detections_option
@_options
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
    """Evaluate the subjects of a command line one after the other, and print the report."""
    shard = None if data.shard is None else Shard.from_text(data.shard)
    found = Subjects(subjects, weights)
    candidates = found.candidates(run_on)
    protocol = read(found)
    with contextlib.ExitStack() as stack:
        answers = []
        common = {"protocol": protocol.name, "images": str(data.images.resolve()), **protocol.key}
        for candidate in candidates:
            key = {**common, **candidate.key}
            opened = Answers.opened(data.output, key, resume=data.resume, shard=shard)
            answers.append(stack.enter_context(opened))
        part = slice(None) if shard is None else slice(shard.index, None, shard.count)
        pictures = protocol.pictures[part]
        with stage_bar("evaluate", len(pictures) * len(candidates) + 1) as stage:
            for candidate, own in zip(candidates, answers, strict=True):
                _answer(protocol, candidate, pictures, own, stage)
            stage("score")
            names = (candidate.name for candidate in candidates)
            by_name = dict(zip(names, answers, strict=True))
            report = None if shard else report_of(protocol, by_name)
    if report is not None:
        click.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))


def _answer(
    protocol: EvaluationProtocol,
    candidate: Candidate,
    pictures: Sequence[DataPicture],
    answers: Answers,
    stage: Callable[[str], None],
) -> None:
    """Load a subject, unless all its answers are there, and ask it."""
    left = [picture for picture in pictures if picture.id not in answers.done]
    for _ in range(len(pictures) - len(left)):
        stage(candidate.name)
    if left:
        with candidate.opened() as subject:
            answer_all(protocol, subject, left, answers, functools.partial(stage, candidate.name))
