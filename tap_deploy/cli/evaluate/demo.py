"""``tap-export eval demo``: scores the demo model, in PyTorch and as a bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.cli.evaluate.runs import runs_options
from tap_deploy.config import DEMO
from tap_deploy.console.config_file import config_from_file
from tap_deploy.console.extras import require_export_extra
from tap_deploy.console.options import FILE, NamedPath, json_option
from tap_deploy.console.progress import stage_bar
from tap_deploy.demo_model import DemoModel
from tap_deploy.errors import BundleError, InputError
from tap_deploy.predictor import TapPredictor
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.storage.files import sha256_of_file
from tap_deploy.storage.unfinished import temporary_folder

if TYPE_CHECKING:
    from tap_deploy.training.scores.evaluation import Scores, Subject

SPLIT = "test"  # neither training nor model selection saw it


@click.command("demo")
@click.argument("bundle", type=NamedPath(), required=False)
@runs_options
@click.option("--checkpoint", type=FILE, help="Score PyTorch on these weights as well.")
@click.option("--config", type=FILE, help="TapConfig of the checkpoint; default: the bundle's.")
@click.option(
    "--regions",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Number of objects, each prompted by its box and by one point.",
)
@click.option(
    "--require",
    is_flag=True,
    help="Exit with 1 if a score misses a target of the demo model.",
)
@json_option
def eval_demo_command(
    bundle: str | None,
    run_on: list[RunOn],
    checkpoint: pathlib.Path | None,
    config: pathlib.Path | None,
    regions: int,
    require: bool,
    as_json: bool,
) -> None:
    """Score BUNDLE on generated scenes outside the training set.

    Without BUNDLE, exports and scores the tap_demo that comes with the package. Scores PyTorch as
    well if BUNDLE was made from the shipped weights, or with --checkpoint. Covers masks at full
    picture size, names and captions. Needs the train extra for the scenes.
    """
    if config is not None and checkpoint is None:
        raise InputError("--config without --checkpoint; pass the weights that it belongs to")
    scores = score_demo(bundle, run_on, regions, checkpoint, config)
    click.echo(_as_json(scores) if as_json else _as_text(scores))
    if require:
        _require(scores)


def score_demo(
    bundle: str | None,
    run_on: Iterable[RunOn],
    regions: int,
    checkpoint: pathlib.Path | None = None,
    config: pathlib.Path | None = None,
) -> dict[str, Scores]:
    """Score a bundle, and PyTorch on the weights that it was made from if they are known.

    Args:
        bundle: path of the bundle; None exports the model that comes with the package.
        run_on: what runs the graphs; each is scored.
        regions: number of objects.
        checkpoint: weights for PyTorch; None for the shipped ones, if the bundle was made from
            them and torch is installed.
        config: TapConfig of the checkpoint as JSON; None for the bundle's.

    Returns:
        Scores by the name of what was scored.

    Raises:
        InputError: a checkpoint, but no bundle.
        TapError: the bundle or the checkpoint cannot be used, or a package is not installed.
    """
    with contextlib.ExitStack() as stack:
        if bundle is None:
            if checkpoint is not None:
                raise InputError(
                    "--checkpoint without BUNDLE; export those weights, and name the bundle"
                )
            bundle = stack.enter_context(_exported_demo())
        opened = Bundle.open(bundle)
        checkpoint = checkpoint or _shipped_weights(opened)
        subjects: dict[str, Subject] = {}
        if checkpoint is not None:
            subjects["PyTorch"] = reference_subject(opened, checkpoint, config)
        for chosen in run_on:
            name = f"{chosen.backend} {chosen.precision}"
            subjects[name] = stack.enter_context(
                TapPredictor.from_bundle(bundle, check_hashes=False, **dataclasses.asdict(chosen))
            )
        return evaluate_subjects(subjects, opened.manifest.weights_config.image_size, regions)


def _shipped_weights(bundle: Bundle) -> pathlib.Path | None:
    """Return the shipped weights if the bundle was made from them and torch is installed."""
    weights = DemoModel().weights
    if importlib.util.find_spec("torch") is None or not weights.is_file():
        return None
    made_of = bundle.manifest.checkpoint.sha256
    return weights if made_of == sha256_of_file(weights) else None


@contextlib.contextmanager
def _exported_demo() -> Iterator[str]:
    """Yield a bundle of the shipped model, in a temporary folder."""
    require_export_extra()
    from tap_deploy.export.demo import export_demo

    with temporary_folder() as folder:
        yield str(export_demo(DemoModel(), folder / DEMO).path)


def _require(scores: dict[str, Scores]) -> None:
    from tap_deploy.training.scores.targets import require_targets

    require_targets(scores)


def evaluate_subjects(
    subjects: dict[str, Subject], image_size: int, regions: int
) -> dict[str, Scores]:
    """Score each subject on the same test scenes.

    Args:
        subjects: by their names in the report.
        image_size: side of the scenes in pixels.
        regions: number of objects.
    """
    from tap_deploy.training.scenes.scenes import SceneGenerator
    from tap_deploy.training.scores.evaluation import evaluate

    scenes, scores = SceneGenerator(SPLIT, image_size), {}
    with stage_bar("evaluate", regions * len(subjects)) as stage:
        for name, subject in subjects.items():
            scores[name] = evaluate(subject, scenes, regions, functools.partial(stage, name))
    return scores


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
    from tap_deploy.reference.predictor import ReferencePredictor

    if config is None:
        sizes, image_size = bundle.manifest.weights_config, bundle.config.image_size
    else:
        sizes, image_size = config_from_file(config), None
    vocabulary, tokenizer = bundle.vocabulary(), bundle.tokenizer()
    if vocabulary is None or tokenizer is None:
        raise BundleError(
            f"bundle {bundle.path} has no concepts or no tokenizer; export it again with "
            "--concepts and --tokenizer"
        )
    model, _ = load_checkpoint(checkpoint, sizes, image_size=image_size)
    return ReferencePredictor(model, vocabulary, tokenizer)


def _as_json(scores: dict[str, Scores]) -> str:
    return json.dumps({name: score.to_dict() for name, score in scores.items()}, indent=2)


def _as_text(scores: dict[str, Scores]) -> str:
    from tap_deploy.training.scores.evaluation import comparison

    return comparison(scores)
