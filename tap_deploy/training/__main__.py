"""``python -m tap_deploy.training``: train the demo model, in one go or in pieces."""

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
@click.option("--resume", is_flag=True, help="Go on with the run in the folder.")
@click.option("--minutes", type=click.FloatRange(min=0), help="Stop after so long, to be resumed.")
@click.option(
    "--weights",
    type=click.Path(path_type=pathlib.Path),
    help="Checkpoint that a new run begins with, such as one of an earlier run.",
)
@click.option("--steps", type=int, help="Length of the run; may change with --resume.")
@click.option("--seed", type=int, help="Of weights, scenes and prompts of a new run.")
@click.option("--learning-rate", type=float, help="The highest of a new run.")
@click.option("--mask-weight", type=float, help="Of the mask losses of a new run.")
@click.option("--caption-weight", type=float, help="Of the captions of a new run.")
@click.option("--dense-weight", type=float, help="Of the auxiliary heads of a new run.")
@click.option("--pictures-per-step", type=int, help="Scenes in a batch of a new run.")
@click.option("--regions-per-picture", type=int, help="Prompts on each scene of a new run.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the products in a new run.")
@click.option("--device", help="Default: cuda if there is a GPU, else cpu.")
@click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads; default: all usable cores."
)
@click.option(
    "--workers", type=click.IntRange(min=0), default=1, show_default=True, help="Scene makers."
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
    """Train a small TAP on made scenes. One line of progress is printed per report.

    A run can be stopped with Ctrl-C, and goes on with --resume.
    """
    folder = RunFolder(path=output)
    given = {name: changes[name] for name in _CHANGEABLE}
    # Nothing is begun that could not go on here.
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
    except (RuntimeError, AssertionError) as exc:  # the latter from a build without CUDA
        raise InputError(f"device {name!r} cannot be used here: {first_line(exc)}") from exc


def _new_config(changes: dict[str, Any]) -> TrainingConfig:
    return TrainingConfig(**{name: value for name, value in changes.items() if value is not None})


def begin_or_check(
    folder: RunFolder,
    resume: bool,
    changes: dict[str, Any],
    weights: pathlib.Path | None = None,
) -> None:
    """Begin a run with some numbers changed, or make sure that there is one to go on with.

    A run that goes on may get another length, as long as it is not over by then.

    Raises:
        InputError: other numbers or the first weights were changed for a run that goes on, or
            fewer steps were asked for than were done, or see ``RunFolder``.
        CheckpointError: the state of the run is broken, or the weights are.
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
        raise InputError(f"{options} cannot change in a run that goes on; leave it out")
    if steps is not None:
        done = steps_done(folder.state) if folder.state.exists() else 0
        if steps < done:
            raise InputError(f"--steps is {steps}; expected at least {done}, which are done")
        folder.change_steps(steps)


def stop_on_signals() -> Callable[[], bool]:
    """Return a function that tells whether the user or the system has asked the run to stop.

    The first SIGINT or SIGTERM is only taken note of, so that the run ends between two steps; a
    second one ends it at once.
    """
    asked = threading.Event()

    def take_note(number: int, frame: types.FrameType | None) -> None:
        asked.set()
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, take_note)
    return asked.is_set


if __name__ == "__main__":
    train_command()
