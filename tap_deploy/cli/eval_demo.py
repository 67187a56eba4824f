"""``tap-export eval-demo``: how good the demo model is, in PyTorch and as a bundle."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import TYPE_CHECKING

import click

from tap_deploy.bundle import Bundle
from tap_deploy.cli.export import config_from_file
from tap_deploy.cli.extras import require_export_extra
from tap_deploy.cli.options import (
    backend_option,
    bundle_argument,
    json_option,
    precision_option,
    threads_option,
)
from tap_deploy.cli.progress import stage_bar
from tap_deploy.errors import BundleError, InputError
from tap_deploy.predictor import TapPredictor

if TYPE_CHECKING:
    from tap_deploy.training.evaluation import Scores, Subject

FILE = click.Path(path_type=pathlib.Path)
SPLIT = "test"  # nothing was trained or chosen on it


@click.command("eval-demo")
@bundle_argument
@backend_option
@precision_option
@threads_option
@click.option("--checkpoint", type=FILE, help="Score PyTorch on these weights as well.")
@click.option("--config", type=FILE, help="TapConfig of the checkpoint; default: the bundle's.")
@click.option(
    "--regions",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="How many objects to ask for, each with its box and with one point.",
)
@json_option
def eval_demo_command(
    bundle: str,
    backend: str,
    precision: str,
    threads: int | None,
    checkpoint: pathlib.Path | None,
    config: pathlib.Path | None,
    regions: int,
    as_json: bool,
) -> None:
    """Score BUNDLE on made scenes that the demo model was not trained on.

    Masks at full picture size, names, captions. Needs the train extra for the scenes.
    """
    if config is not None and checkpoint is None:
        raise InputError("--config without --checkpoint; pass the weights that it belongs to")
    opened = Bundle.open(bundle)
    subjects: dict[str, Subject] = {}
    if checkpoint is not None:
        subjects["PyTorch"] = reference_subject(opened, checkpoint, config)
    subjects[f"{backend} {precision}"] = bundle_subject(bundle, backend, precision, threads)
    scores = evaluate_subjects(subjects, opened.config.image_size, regions)
    click.echo(_as_json(scores) if as_json else _as_text(scores))


def evaluate_subjects(
    subjects: dict[str, Subject], image_size: int, regions: int
) -> dict[str, Scores]:
    """Score each subject on the same test scenes.

    Args:
        subjects: by the name that the report calls them.
        image_size: side of the scenes in pixels.
        regions: objects to ask for.
    """
    from tap_deploy.training.evaluation import evaluate
    from tap_deploy.training.scenes import SceneGenerator

    scenes, scores = SceneGenerator(SPLIT, image_size), {}
    with stage_bar("evaluate", regions * len(subjects)) as stage:
        for name, subject in subjects.items():
            scores[name] = evaluate(subject, scenes, regions, functools.partial(stage, name))
    return scores


def bundle_subject(bundle: str, backend: str, precision: str, threads: int | None) -> Subject:
    """Return a bundle as a subject.

    Raises:
        BundleError: the bundle is incomplete or changed.
    """
    from tap_deploy.training.evaluation import BundleSubject

    predictor = TapPredictor.from_bundle(bundle, backend, precision, threads, check_hashes=False)
    return BundleSubject(predictor)


def reference_subject(
    bundle: Bundle, checkpoint: pathlib.Path, config: pathlib.Path | None
) -> Subject:
    """Return the PyTorch model as a subject, with the concepts and the tokenizer of a bundle.

    Raises:
        BundleError: the bundle has no concepts or no tokenizer.
        CheckpointError: the weights do not fit.
        MissingDependencyError: torch is not installed.
    """
    require_export_extra()
    from tap_deploy.reference.checkpoint import load_checkpoint
    from tap_deploy.training.reference_subject import ReferenceSubject

    sizes = bundle.config if config is None else config_from_file(config)
    vocabulary, tokenizer = bundle.vocabulary(), bundle.tokenizer()
    if vocabulary is None or tokenizer is None:
        raise BundleError(
            f"bundle {bundle.path} has no concepts or no tokenizer; export it again with "
            "--concepts and --tokenizer"
        )
    model, _ = load_checkpoint(checkpoint, sizes)
    return ReferenceSubject(model, vocabulary, tokenizer)


def _as_json(scores: dict[str, Scores]) -> str:
    return json.dumps({name: score.to_dict() for name, score in scores.items()}, indent=2)


def _as_text(scores: dict[str, Scores]) -> str:
    from tap_deploy.training.evaluation import comparison

    return comparison(scores)
