"""``python -m tap_deploy.training.ship.ship``: makes the demo model's files from a training run.

It writes weights in float16, tokenizer, concepts, config, sample pictures, and a model card with
the scores of the shipped weights in PyTorch and as an exported bundle.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from tap_deploy.concepts import Vocabulary
from tap_deploy.config import DEMO, VARIANTS
from tap_deploy.console.exits import CleanExits
from tap_deploy.console.extras import require_export_extra
from tap_deploy.demo_model import DEMO_FOLDER, MAX_WEIGHTS_BYTES, DemoModel
from tap_deploy.errors import CheckpointError, InputError, VerificationError
from tap_deploy.export.demo import export_demo
from tap_deploy.predictor import TapPredictor
from tap_deploy.reference.checkpoint import load_checkpoint, save_checkpoint
from tap_deploy.reference.model import TapModel
from tap_deploy.reference.predictor import ReferencePredictor
from tap_deploy.reference.state import COUNTER_SUFFIX, INDEX_SUFFIX
from tap_deploy.storage.files import atomic_folder, sha256_of_file
from tap_deploy.storage.unfinished import temporary_folder
from tap_deploy.tokenizer import Tokenizer
from tap_deploy.training.config import TrainingConfig
from tap_deploy.training.run.progress import training_summary
from tap_deploy.training.run.run_folder import RunFolder
from tap_deploy.training.scenes.scenes import SceneSource
from tap_deploy.training.scores.evaluation import Scores, evaluate
from tap_deploy.training.scores.targets import missed_targets
from tap_deploy.training.ship.model_card import CardFacts, model_card
from tap_deploy.training.ship.sample_scenes import SAMPLE_SEEDS, write_samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShipOptions:
    """Options of ``ship``.

    Attributes:
        regions: number of regions of the evaluation.
        sample_seeds: seeds of the sample pictures.
    """

    regions: int = 1000
    sample_seeds: tuple[int, ...] = SAMPLE_SEEDS


@click.command("ship", cls=CleanExits, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=DEMO_FOLDER,
    show_default="the folder in the package",
    help="Folder to write or replace.",
)
@click.option(
    "--regions",
    type=click.IntRange(min=1),
    default=ShipOptions.regions,
    show_default=True,
    help="Regions of the test split to evaluate on.",
)
def ship_command(run: Path, output: Path, regions: int) -> int:
    """Make the files of tap_demo from the training run in folder RUN, and evaluate them.

    Exit codes: 0 all targets met, 1 files written but a target missed, 2 nothing written.
    """
    from tap_deploy.training.scenes.scenes import SceneGenerator

    config = RunFolder(path=run).read_config()
    if config.model != VARIANTS[DEMO]:
        raise InputError(f"run {run} has a model of other sizes; expected those of {DEMO}")
    scenes = SceneGenerator("test", config.model.image_size)
    try:
        facts = ship(RunFolder(path=run), output, scenes, ShipOptions(regions=regions), click.echo)
    except VerificationError as exc:  # exit code 2, as no files were written
        raise InputError(f"nothing was written: {exc}") from exc
    missed = missed_targets(facts.scores)
    if facts.weights_bytes > MAX_WEIGHTS_BYTES:
        missed.append(
            f"weights have {facts.weights_bytes} bytes, expected at most {MAX_WEIGHTS_BYTES}"
        )
    for line in missed:
        click.echo(f"missed: {line}")
    return 1 if missed else 0


def ship(
    run: RunFolder,
    output: Path,
    scenes: SceneSource,
    options: ShipOptions,
    say: Callable[[str], None],
) -> CardFacts:
    """Make the folder of the demo model; it appears only when complete.

    Args:
        run: the run, with the averaged model of its last report.
        output: the folder to write or replace.
        scenes: scenes of the test split.
        options: options of the evaluation and the samples.
        say: called with each progress line.

    Raises:
        InputError: there is no run, or it has no model yet; or ``output`` is another kind of
            folder.
        CheckpointError: the weights cannot be read, or exceed the range of float16.
        VerificationError: the exported graphs differ from PyTorch.
    """
    config = run.read_config()
    if not run.model.is_file():
        raise InputError(f"{run.model} is missing; the run has no report yet; resume it first")
    with atomic_folder(output, force=True, marker=DemoModel().config.name) as folder:
        demo = DemoModel(folder=folder)
        say(f"weights of step {training_summary(run.progress)['step']}, sample pictures")
        model, _ = load_checkpoint(run.model, config.model)
        write_shipped_weights(model, demo.weights)
        shutil.copyfile(run.tokenizer, demo.tokenizer)
        shutil.copyfile(run.concepts, demo.concepts)
        _write_json(demo.config, config.model.to_dict())
        write_samples(scenes, demo.samples, options.sample_seeds)
        scores = _measure(demo, config, scenes, options.regions, say)
        facts = CardFacts(
            scores=scores,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            names=len(Vocabulary.load(demo.concepts)),
            weights_bytes=demo.weights.stat().st_size,
            weights_sha256=sha256_of_file(demo.weights),
            training=run.summary(),
            history=run.history.read_text("utf-8") if run.history.is_file() else "",
            tools=_tools(),
        )
        _write_json(demo.scores, facts.to_dict())
        demo.card.write_text(model_card(facts), "utf-8")
    say(f"{output}: {facts.weights_bytes / 1e6:.2f} MB of weights")
    return facts


def _measure(
    demo: DemoModel,
    config: TrainingConfig,
    scenes: SceneSource,
    regions: int,
    say: Callable[[str], None],
) -> dict[str, Scores]:
    """Return the scores of the shipped files, in PyTorch and as a bundle."""
    require_export_extra()
    say(f"PyTorch on {regions} regions")
    model, _ = load_checkpoint(demo.weights, config.model)
    reference = ReferencePredictor(model, Vocabulary.load(demo.concepts), Tokenizer(demo.tokenizer))
    scores = {"PyTorch": evaluate(reference, scenes, regions)}
    with temporary_folder() as temporary:
        say("export")
        bundle = export_demo(demo, temporary / DEMO, config.model)
        say(f"ONNX graphs on {regions} regions")
        with TapPredictor.from_bundle(bundle.path) as predictor:
            scores["onnxruntime fp32"] = evaluate(predictor, scenes, regions)
    return scores


def _tools() -> dict[str, str]:
    from tap_deploy.export.bundle_export import tool_versions

    versions = tool_versions()
    return {name: versions[name] for name in ("tap-deploy", "torch", "onnxruntime", "numpy")}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    ship_command()


def shipped_state(model: TapModel) -> dict[str, torch.Tensor]:
    """Return the entries to ship: parameters in float16, buffers in float32.

    Relative position indices and batch counters are left out, as ``load_checkpoint`` recreates
    them. Buffers (BatchNorm statistics, Fourier frequencies, pixel means) are only 0.1 % of all
    numbers, so they keep full precision.

    Raises:
        CheckpointError: a weight is too large for float16.
    """
    parameters = dict(model.named_parameters())
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith((INDEX_SUFFIX, COUNTER_SUFFIX)):
            continue
        state[name] = value.half() if name in parameters else value
        if not torch.isfinite(state[name]).all():
            raise CheckpointError(
                f"entry {name} reaches {float(value.abs().max()):g}; expected at most 65504, the "
                "largest float16; train with more weight decay"
            )
    return state


def write_shipped_weights(model: TapModel, path: Path) -> None:
    """Write ``shipped_state`` as safetensors."""
    save_checkpoint(shipped_state(model), path)
