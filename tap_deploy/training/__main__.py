"""``python -m tap_deploy.training``: trains the demo model, in one or several sessions."""

from __future__ import annotations

import pathlib
import signal
import threading
import types
from collections.abc import Callable
from typing import Any

import click
import torch

from tap_deploy.console.exits import CleanExits
from tap_deploy.errors import InputError, first_line
from tap_deploy.machine.cpu import usable_cores
from tap_deploy.training.config import DTYPES, TrainingConfig
from tap_deploy.training.run.run import RunOptions, train
from tap_deploy.training.run.run_folder import RunFolder
from tap_deploy.training.run.trainer import steps_done
from tap_deploy.training.scenes.scenes import SceneGenerator
from tap_deploy.training.words.caption_tokenizer import train_tokenizer
from tap_deploy.training.words.concept_space import concept_vocabulary

_CHANGEABLE = (
    "steps",
    "seed",
    "dtype",
    "learning_rate",
    "mask_weight",
    "caption_weight",
    "dense_weight",
    "pictures_per_step",
    "regions_per_picture",
)


@click.command("training", cls=CleanExits, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-o", "--output", type=click.Path(path_type=pathlib.Path), required=True, help="Run folder."
)
@click.option("--resume", is_flag=True, help="Resume the run in the folder.")
@click.option("--minutes", type=click.FloatRange(min=0), help="Stop after this time, resumable.")
@click.option(
    "--weights",
    type=click.Path(path_type=pathlib.Path),
    help="Initial checkpoint of a new run, such as one of an earlier run.",
)
@click.option("--steps", type=int, help="Length of the run; may change with --resume.")
@click.option("--seed", type=int, help="Seed of weights, scenes and prompts of a new run.")
@click.option("--learning-rate", type=float, help="Peak learning rate of a new run.")
@click.option("--mask-weight", type=float, help="Weight of the mask losses of a new run.")
@click.option("--caption-weight", type=float, help="Weight of the caption loss of a new run.")
@click.option("--dense-weight", type=float, help="Weight of the auxiliary heads of a new run.")
@click.option("--pictures-per-step", type=int, help="Scenes per batch of a new run.")
@click.option("--regions-per-picture", type=int, help="Prompts per scene of a new run.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Dtype of matrix products of a new run.")
@click.option("--device", help="Default: cuda if there is a GPU, else cpu.")
@click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads; default: all usable cores."
)
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Processes that make scenes.",
)
@click.option("--report-every", type=click.IntRange(min=1), default=500, show_default=True)
@click.option("--held-out-regions", type=click.IntRange(min=1), default=100, show_default=True)
def train_command(
    output: pathlib.Path,
    resume: bool,
    minutes: float | None,
    weights: pathlib.Path | None,
    device: str | None,
    threads: int | None,
    workers: int,
    report_every: int,
    held_out_regions: int,
    **changes: Any,
) -> None:
    """Train a small TAP on synthetic scenes. Prints one line per report.

    Ctrl-C stops a run; --resume continues it.
    """
    folder = RunFolder(path=output)
    given = {name: changes[name] for name in _CHANGEABLE}
    # Check the device and the scenes first: a new run must be able to continue here.
    where = _device(device)
    size = (folder.read_config() if resume else _new_config(given)).model.image_size
    scenes, held_out = SceneGenerator("train", size), SceneGenerator("validation", size)
    begin_or_check(folder, resume, given, weights)
    torch.set_num_threads(threads or min(torch.get_num_threads(), usable_cores()))
    options = RunOptions(
        device=where,
        workers=workers,
        report_every=report_every,
        held_out_regions=held_out_regions,
        minutes=minutes,
    )
    train(folder, scenes, held_out, options, say=click.echo, should_stop=stop_on_signals())


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as exc:  # AssertionError: a build without CUDA
        raise InputError(f"device {name!r} cannot be used here: {first_line(exc)}") from exc


def _new_config(changes: dict[str, Any]) -> TrainingConfig:
    return TrainingConfig(**{name: value for name, value in changes.items() if value is not None})


def begin_or_check(
    folder: RunFolder,
    resume: bool,
    changes: dict[str, Any],
    weights: pathlib.Path | None = None,
) -> None:
    """Start a new run with some settings changed, or check that a run can be resumed.

    A resumed run may get another number of steps, but not less than it has done.

    Raises:
        InputError: settings other than the steps, or initial weights, are given for a resumed run;
            or the steps are fewer than those done; or see ``RunFolder``.
        CheckpointError: the state of the run or the weights are corrupt.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    steps = given.pop("steps", None) if resume else None
    if not resume:
        config = _new_config(given)
        tokenizer = train_tokenizer(vocab_size=config.model.vocab_size)
        folder.begin(config, concept_vocabulary(), tokenizer, weights)
    elif given or weights is not None:
        names = [*given, *([] if weights is None else ["weights"])]
        options = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise InputError(f"{options} cannot change in a resumed run; leave it out")
    if steps is not None:
        done = steps_done(folder.state) if folder.state.exists() else 0
        if steps < done:
            raise InputError(f"--steps is {steps}; expected at least {done}, the steps done so far")
        folder.change_steps(steps)


def stop_on_signals() -> Callable[[], bool]:
    """Return a function that tells whether the run has been asked to stop.

    The first SIGINT, SIGTERM or SIGHUP sets a flag, so that the run ends between two steps; a
    second one ends it at once. Signals that are ignored, as under nohup, stay so.
    """
    asked, every = threading.Event(), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    signals = [each for each in every if signal.getsignal(each) is not signal.SIG_IGN]

    def take_note(number: int, frame: types.FrameType | None) -> None:
        asked.set()
        for each in signals:
            signal.signal(each, signal.SIG_DFL)

    for each in signals:
        signal.signal(each, take_note)
    return asked.is_set


if __name__ == "__main__":
    train_command()
