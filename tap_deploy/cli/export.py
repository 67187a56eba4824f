"""``tap-export export``: exports a checkpoint to a bundle."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import TYPE_CHECKING, Any

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.manifest import MANIFEST_NAME
from tap_deploy.cli.convert import convert_bundle, describe_fp16, require_convertible
from tap_deploy.cli.model_options import ModelOptions, model_options
from tap_deploy.cli.quantize import add_int8, calibration_data_option, describe_int8
from tap_deploy.cli.verdict import require_passed
from tap_deploy.console.extras import require_export_extra
from tap_deploy.console.options import (
    FILE,
    force_option,
    json_option,
    option_group,
    samples_option,
    strict_option,
)
from tap_deploy.console.progress import stage_bar
from tap_deploy.errors import InputError
from tap_deploy.precisions import FP32, INT8, PRECISIONS
from tap_deploy.storage.files import check_folder_output

if TYPE_CHECKING:
    from tap_deploy.engines.int8.options import Int8Options
    from tap_deploy.export.bundle_export import ExportedBundle


@dataclasses.dataclass(frozen=True, kw_only=True)
class FurtherPrecisions:
    """Precisions to add to a new bundle.

    Attributes:
        precisions: some of ``PRECISIONS``; fp32 is always there.
        samples: pictures to measure fp16 activations on.
        calibration_data: pictures for int8.
        strict: stop at an unreadable picture instead of skipping it.
    """

    precisions: tuple[str, ...] = (FP32,)
    samples: tuple[pathlib.Path, ...] = ()
    calibration_data: pathlib.Path | None = None
    strict: bool = False

    @property
    def in_order(self) -> list[str]:
        """The precisions to add, fp16 before int8, which needs it."""
        return [name for name in PRECISIONS if name in self.precisions and name != FP32]

    def check(self, model: ModelOptions) -> None:
        """Check, before an export that takes minutes, that the precisions can be made.

        Raises:
            InputError: one of them cannot.
            MissingDependencyError: a package is not installed.
        """
        for name in self.in_order:
            if name == INT8:
                self._int8_options(model).images()
            else:
                require_convertible(name)

    def add_to(self, bundle: Bundle, model: ModelOptions) -> tuple[list[str], dict[str, Any]]:
        """Add the precisions to a bundle.

        Returns:
            A text on each, and the report of the verdict on int8, empty without one.
        """
        texts, verdict = [], {}
        for name in self.in_order:
            if name == INT8:
                summary = add_int8(bundle, self._int8_options(model), checkpoint=model.checkpoint)
                texts.append(describe_int8(summary))
                verdict = summary["verdict"]
            else:
                texts.append(
                    describe_fp16(convert_bundle(bundle, self.samples, strict=self.strict))
                )
        return texts, verdict

    def _int8_options(self, model: ModelOptions) -> Int8Options:
        """Return the defaults of ``quantize``; synthetic weights have no accuracy to judge."""
        require_export_extra()
        from tap_deploy.engines.int8.options import Int8Options, QuantizeOptions
        from tap_deploy.engines.verdict.judge import VerdictOptions

        return Int8Options(
            quantize=QuantizeOptions(calibration_data=self.calibration_data, strict=self.strict),
            verdict=None if model.is_synthetic else VerdictOptions(),
        )


precision_options = option_group(
    "further",
    FurtherPrecisions,
    click.option(
        "--precision",
        "precisions",
        multiple=True,
        default=(FP32,),
        show_default=True,
        type=click.Choice(PRECISIONS),
        help="Precisions of the bundle; repeatable. fp32 is always made.",
    ),
    samples_option,
    calibration_data_option,
    strict_option,
)


@click.command("export")
@model_options
@precision_options
@click.option("-o", "--output", type=FILE, required=True, help="Folder of the bundle.")
@force_option
@json_option
def export_command(
    model: ModelOptions,
    further: FurtherPrecisions,
    output: pathlib.Path,
    force: bool,
    as_json: bool,
) -> None:
    """Export a checkpoint as a bundle of three ONNX graphs.

    Each graph is compared with PyTorch before the bundle is written.

    Other precisions are added once the fp32 bundle is complete; if one fails, the fp32 bundle is
    kept.
    """
    further.check(model)
    check_folder_output(output, force=force, marker=MANIFEST_NAME)
    _refuse_inputs_inside(output, model, further)
    model = model.with_published_files().with_demo_files()
    exported = export_model(model, output, force=force)
    texts, verdict = further.add_to(exported.bundle, model)
    click.echo(_as_json(exported) if as_json else _as_text(exported, texts))
    if verdict:
        require_passed(verdict)


def export_model(
    model: ModelOptions, output: pathlib.Path, *, force: bool = False
) -> ExportedBundle:
    """Export a model in fp32, with a progress bar; see ``export_bundle``.

    Args:
        model: sizes and files.
        output: folder of the bundle.
        force: replace an existing bundle.
    """
    name, config = model.named_config()
    require_export_extra()
    from tap_deploy.export.bundle_export import NUM_STAGES, export_bundle

    with stage_bar("export", NUM_STAGES + 1) as stage:
        stage("load weights")
        weights, record, removed = model.load(config)
        exported = export_bundle(
            weights,
            output,
            name=name,
            checkpoint=record,
            concepts=model.concepts,
            tokenizer=model.tokenizer,
            force=force,
            on_stage=stage,
        )
    if removed:
        click.echo(f"note: {record.file} was read without {', '.join(removed)} in names", err=True)
    return exported


def _refuse_inputs_inside(
    output: pathlib.Path, model: ModelOptions, further: FurtherPrecisions
) -> None:
    """Refuse an output folder that holds an input: it is deleted when the new one is complete."""
    inputs = (model.config, model.checkpoint, model.concepts, model.tokenizer)
    folder = os.path.realpath(output)
    for path in (*inputs, further.calibration_data):
        if path is not None and pathlib.Path(os.path.realpath(path)).is_relative_to(folder):
            raise InputError(f"{path} lies inside the output {output}; choose another output")


def _as_json(exported: ExportedBundle) -> str:
    manifest = json.loads(exported.bundle.manifest.to_json())
    keys = ("model", "checkpoint", "graphs", "tools", "verification", "precisions")
    result = {"bundle": str(exported.bundle.path)} | {key: manifest[key] for key in keys}
    return json.dumps(result, indent=2)


def _as_text(exported: ExportedBundle, added: list[str]) -> str:
    from tap_deploy.cli.inspect import describe

    parts = [str(exported.report), *added, describe(exported.bundle)]
    return "\n\n".join(parts)
