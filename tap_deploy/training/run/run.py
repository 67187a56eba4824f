"""Runs or resumes training until the last step or a time limit."""

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
    """Options that may change when a run is resumed.

    Attributes:
        device: torch device.
        workers: processes that make batches ahead; 0 for none.
        report_every: steps between reports; every report also saves the state.
        held_out_regions: validation regions per report.
        minutes: time limit, minutes, after which the state is saved; None for no limit.
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
    """Train from the current step of a run to its end or limit; save state and model.

    Args:
        folder: folder of a started run.
        scenes: training scenes.
        held_out: validation scenes.
        options: options of this part of the run.
        say: called with each progress line.
        should_stop: called after every step; if it returns True, save the state and stop.

    Raises:
        InputError: the folder contains no run, or cannot be written.
        CheckpointError: the state is corrupt, or the loss is not finite.
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
        scores = _scores(trainer, folder, held_out, options)
        say(progress.report(trainer.step, trainer.unreported, scores))

    if trainer.step > folder.reported_step():
        report()  # the run was stopped between its state and the report
    for batch in batches:
        progress.add(trainer.train_step(batch))
        time_is_up = (
            options.minutes is not None and time.monotonic() - started > 60 * options.minutes
        )
        stop = time_is_up or should_stop() or trainer.step == config.steps
        if stop or trainer.step % options.report_every == 0:
            trainer.unreported = progress.means()
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
