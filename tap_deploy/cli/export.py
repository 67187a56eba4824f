"""``tap-export export``: a checkpoint to a bundle."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING

import click

from tap_deploy.bundle.manifest import MANIFEST_NAME, CheckpointRecord
from tap_deploy.cli.convert import convert_bundle, describe_fp16, require_convertible
from tap_deploy.cli.options import FILE, force_option, json_option, samples_option, strict_option
from tap_deploy.cli.quantize import add_int8, calibration_data_option, describe_int8
from tap_deploy.cli.verdict import require_passed
from tap_deploy.config import DEMO, VARIANTS, TapConfig, config_from_file
from tap_deploy.console.extras import require_export_extra
from tap_deploy.console.progress import stage_bar
from tap_deploy.demo_model import DemoModel
from tap_deploy.errors import InputError
from tap_deploy.precisions import FP32, INT8, PRECISIONS
from tap_deploy.storage.files import check_folder_output

if TYPE_CHECKING:
    from tap_deploy.engines.int8.options import Int8Options
    from tap_deploy.export.bundle_export import ExportedBundle
    from tap_deploy.reference.model import TapModel


@click.command("export")
@click.option(
    "--model",
    type=click.Choice(list(VARIANTS)),
    help=f"A published variant, or {DEMO}, whose files come with this package.",
)
@click.option(
    "--config",
    type=FILE,
    help='JSON file with the fields of TapConfig, or with them under "config".',
)
@click.option("--checkpoint", type=FILE, help="Weights: official .pkl, .pth or .safetensors.")
@click.option(
    "--synthetic-weights",
    type=click.IntRange(min=0),
    metavar="SEED",
    help="Made-up weights in place of a checkpoint, to try and to time the machinery.",
)
@click.option(
    "--mark-synthetic",
    is_flag=True,
    help="Record that the weights of --checkpoint are made up.",
)
@click.option("--concepts", type=FILE, help="Concept weights: official .pkl, or .npz.")
@click.option("--tokenizer", type=FILE, help="SentencePiece model for the captions.")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    default=(FP32,),
    show_default=True,
    type=click.Choice(PRECISIONS),
    help="Precisions of the bundle; repeatable. fp32 is always made.",
)
@samples_option
@calibration_data_option
@strict_option
@click.option("-o", "--output", type=FILE, required=True, help="Folder of the bundle.")
@force_option
@json_option
def export_command(
    model: str | None,
    config: pathlib.Path | None,
    checkpoint: pathlib.Path | None,
    synthetic_weights: int | None,
    mark_synthetic: bool,
    concepts: pathlib.Path | None,
    tokenizer: pathlib.Path | None,
    precisions: tuple[str, ...],
    samples: tuple[pathlib.Path, ...],
    calibration_data: pathlib.Path | None,
    strict: bool,
    output: pathlib.Path,
    force: bool,
    as_json: bool,
) -> None:
    """Export a checkpoint as three ONNX graphs, check them against PyTorch, write a bundle.

    A further precision is added when the bundle is complete: if that fails, the bundle remains.
    """
    synthetic = mark_synthetic or synthetic_weights is not None
    further = _further_precisions(precisions, calibration_data, synthetic, strict)
    check_folder_output(output, force=force, marker=MANIFEST_NAME)
    _refuse_inputs_inside(output, [config, checkpoint, concepts, tokenizer, calibration_data])
    name, tap_config = _named_config(model, config)
    if model == DEMO:
        demo = DemoModel()
        if checkpoint is None and synthetic_weights is None:
            checkpoint = demo.require().weights
        concepts, tokenizer = concepts or demo.concepts, tokenizer or demo.tokenizer
    require_export_extra()
    from tap_deploy.export.bundle_export import NUM_STAGES, export_bundle

    with stage_bar("export", NUM_STAGES + 1) as stage:
        stage("load weights")
        tap_model, record, removed = _load(
            tap_config, checkpoint, synthetic_weights, mark_synthetic
        )
        exported = export_bundle(
            tap_model,
            output,
            name=name,
            checkpoint=record,
            concepts=concepts,
            tokenizer=tokenizer,
            force=force,
            on_stage=stage,
        )
    if removed:
        click.echo(f"note: {record.file} was read without {', '.join(removed)} in names", err=True)
    texts, report = [], {}
    for precision in further:
        if precision == INT8:
            options = _int8_options(calibration_data, synthetic, strict)
            summary = add_int8(exported.bundle, options, checkpoint=checkpoint)
            texts.append(describe_int8(summary))
            report = summary["verdict"]
        else:
            texts.append(describe_fp16(convert_bundle(exported.bundle, samples, strict=strict)))
    click.echo(_as_json(exported) if as_json else _as_text(exported, texts))
    if report:
        require_passed(report)


def _further_precisions(
    precisions: tuple[str, ...],
    calibration_data: pathlib.Path | None,
    synthetic: bool,
    strict: bool,
) -> list[str]:
    """Return what has to be made from fp32, fp16 before int8, which is made of both.

    What cannot be made is refused now, before the minutes of an export.
    """
    further = [name for name in PRECISIONS if name in precisions and name != FP32]
    for name in further:
        if name == INT8:
            _int8_options(calibration_data, synthetic, strict).images()
        else:
            require_convertible(name)
    return further


def _int8_options(
    calibration_data: pathlib.Path | None, synthetic: bool, strict: bool
) -> Int8Options:
    """What ``tap-export quantize`` does by default; made-up weights give nothing to judge by."""
    require_export_extra()
    from tap_deploy.engines.int8.options import Int8Options, QuantizeOptions
    from tap_deploy.engines.verdict.judge import VerdictOptions

    return Int8Options(
        quantize=QuantizeOptions(calibration_data=calibration_data, strict=strict),
        verdict=None if synthetic else VerdictOptions(),
    )


def _refuse_inputs_inside(output: pathlib.Path, inputs: list[pathlib.Path | None]) -> None:
    """The old folder goes when the new one is complete; what it is made from must not."""
    folder = output.resolve()
    for path in inputs:
        if path is not None and path.resolve().is_relative_to(folder):
            raise InputError(f"{path} lies inside the output {output}; choose another output")


def _named_config(model: str | None, config: pathlib.Path | None) -> tuple[str, TapConfig]:
    if (model is None) == (config is None):
        raise InputError("pass either --model or --config, to say which model it is")
    if model is not None:
        return model, TapConfig.from_name(model)
    path = pathlib.Path(str(config))
    return path.stem, config_from_file(path)


def _load(
    config: TapConfig, checkpoint: pathlib.Path | None, seed: int | None, mark_synthetic: bool
) -> tuple[TapModel, CheckpointRecord, tuple[str, ...]]:
    """Return the model, what the bundle says of its weights, and what their names had besides."""
    from tap_deploy.export.bundle_export import checkpoint_record
    from tap_deploy.reference.checkpoint import load_checkpoint
    from tap_deploy.reference.synthetic import synthetic_model

    if (checkpoint is None) == (seed is None):
        raise InputError("pass either --checkpoint or --synthetic-weights, to say what it knows")
    if checkpoint is None:
        label = f"synthetic weights, seed {seed}"
        record = CheckpointRecord(file=label, sha256="", md5="", known_as=None, synthetic=True)
        return synthetic_model(config, seed or 0), record, ()
    tap_model, found = load_checkpoint(checkpoint, config)
    record = checkpoint_record(checkpoint.name, found, synthetic=mark_synthetic)
    return tap_model, record, found.removed


def _as_json(exported: ExportedBundle) -> str:
    manifest = json.loads(exported.bundle.manifest.to_json())
    keys = ("model", "checkpoint", "graphs", "tools", "verification", "precisions")
    result = {"bundle": str(exported.bundle.path)} | {key: manifest[key] for key in keys}
    return json.dumps(result, indent=2)


def _as_text(exported: ExportedBundle, added: list[str]) -> str:
    from tap_deploy.cli.inspect import describe

    parts = [str(exported.report), *added, describe(exported.bundle)]
    return "\n\n".join(parts)
