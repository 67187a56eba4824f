"""A run from its first or next step to its end, or until the time is up."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from tap_deploy.concepts import Vocabulary
from tap_deploy.reference.checkpoint import save_checkpoint
from tap_deploy.reference.predictor import ReferencePredictor
from tap_deploy.tokenizer import Tokenizer
from tap_deploy.training.objective.batches import BatchMaker, batches_from
from tap_deploy.training.run.progress import Progress
from tap_deploy.training.run.run_folder import RunFolder
from tap_deploy.training.run.trainer import Trainer
from tap_deploy.training.scenes.scenes import SceneSource
from tap_deploy.training.scores.evaluation import Scores, evaluate
from tap_deploy.training.words.caption_tokenizer import CaptionEncoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What may differ from one piece of a run to the next.

    Attributes:
        device: where to compute.
        workers: processes that make batches ahead of time; 0 for none.
        report_every: steps between two reports, each of which also saves the state.
        held_out_regions: regions that a report is measured on.
        minutes: stop after so long, with the state saved; None for no limit.
    """

    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    workers: int = 1
    report_every: int = 500
    held_out_regions: int = 100
    minutes: float | None = None


def train(
    folder: RunFolder,
    scenes: SceneSource,
    held_out: SceneSource,
    options: RunOptions,
    say: Callable[[str], None] = print,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trainer:
    """Train from where a run stands to its end; the state and the model are in the folder then.

    Args:
        folder: of a run that was begun.
        scenes: to train on.
        held_out: to measure on.
        options: of this piece of the run.
        say: takes the progress line.
        should_stop: asked after every step; the run stops with its state saved.

    Raises:
        InputError: no run was begun in the folder.
        CheckpointError: its state is broken, or training went wrong.
    """
    started = time.monotonic()
    config, vocabulary = folder.read_config(), Vocabulary.load(folder.concepts)
    weights = folder.initial_weights if folder.initial_weights.exists() else None
    trainer = Trainer(config, vocabulary, options.device, weights)
    if folder.state.exists():
        trainer.load(folder.state)
    captions = CaptionEncoder(folder.tokenizer, config.model.text_seq_len - 1)
    batches = batches_from(BatchMaker(config, scenes, captions), trainer.step, options.workers)
    progress = Progress(folder.progress, config.steps)

    def report() -> None:
        save_checkpoint(trainer.averaged_model, folder.model)
        say(progress.report(trainer.step, _scores(trainer, folder, held_out, options)))

    if trainer.step == config.steps and not folder.is_finished():
        report()  # it ended between its last step and its last report
    for batch in batches:
        progress.add(trainer.train_step(batch))
        time_is_up = (
            options.minutes is not None and time.monotonic() - started > 60 * options.minutes
        )
        stop = time_is_up or should_stop() or trainer.step == config.steps
        if stop or trainer.step % options.report_every == 0:
            trainer.save(folder.state)
            report()
        if stop:
            break
    return trainer


def _scores(
    trainer: Trainer, folder: RunFolder, held_out: SceneSource, options: RunOptions
) -> Scores:
    subject = ReferencePredictor(
        trainer.averaged_model, Vocabulary.load(folder.concepts), Tokenizer(folder.tokenizer)
    )
    return evaluate(subject, held_out, options.held_out_regions)
