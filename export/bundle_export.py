"""Exports a PyTorch model as a bundle; it is written only if its graphs match the model."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import os
import pathlib
import platform
import shutil
from collections.abc import Callable, Mapping

import tap_deploy
from tap_deploy import graphs
from tap_deploy.bundle.bundle import (
    CONCEPTS_FILE,
    GOLDEN_FILE,
    ONNX_FOLDER,
    TOKENIZER_FILE,
    Bundle,
    file_records,
)
from tap_deploy.bundle.golden import Golden
from tap_deploy.bundle.json_record import record_from_json
from tap_deploy.bundle.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    CheckpointRecord,
    GraphRecord,
    Manifest,
)
from tap_deploy.bundle.precision_record import PrecisionRecord, VerificationRecord
from tap_deploy.concepts import Vocabulary
from tap_deploy.config import Preprocessing
from tap_deploy.errors import InputError
from tap_deploy.export.exporter import export_graph
from tap_deploy.export.image_encoder import ImageEncoderGraph
from tap_deploy.export.prompt_decoder import PromptDecoderGraph
from tap_deploy.export.samples import GOLDEN_SIZES, golden_samples, rounding_noise
from tap_deploy.export.text_decoder import TextDecoderGraph
from tap_deploy.machine.state import machine_title
from tap_deploy.precisions import FP32
from tap_deploy.reference.checkpoint import Checkpoint
from tap_deploy.reference.model import TapModel
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.opening import create_session
from tap_deploy.storage.files import atomic_folder
from tap_deploy.storage.unpickle import printable
from tap_deploy.tokenizer import Tokenizer
from tap_deploy.verify.comparison import Report
from tap_deploy.verify.graph_check import verify_sessions
from tap_deploy.verify.tolerances import tolerances_for

WRAPPERS = {
    graphs.IMAGE_ENCODER: ImageEncoderGraph,
    graphs.PROMPT_DECODER: PromptDecoderGraph,
    graphs.TEXT_DECODER: TextDecoderGraph,
}
# Calls of `on_stage`: three graphs, the samples, the comparison, the move.
NUM_STAGES = len(WRAPPERS) + 2 + len(GOLDEN_SIZES)

# Rounding in another order moves outputs by about as much as a change of the weights by rounding.
NOISE_MARGIN = 4

TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportedBundle:
    """A finished bundle and the report of its verification.

    Attributes:
        bundle: the bundle.
        report: comparison of its graphs with the reference.
    """

    bundle: Bundle
    report: Report


def export_bundle(
    model: TapModel,
    output: str | os.PathLike[str],
    *,
    name: str,
    checkpoint: CheckpointRecord,
    concepts: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    force: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> ExportedBundle:
    """Export a model, compare the graphs with it, and write a bundle.

    Args:
        model: the reference, on the CPU, in evaluation mode.
        output: the folder to write.
        name: model name in the manifest.
        checkpoint: the source of the weights.
        concepts: concept weights, ``.npz`` or official ``.pkl``.
        tokenizer: a SentencePiece model.
        force: replace an existing bundle at ``output``.
        on_stage: called with a short text before each of ``NUM_STAGES`` stages.

    Raises:
        InputError: concepts or tokenizer do not fit the model, or the output cannot be written.
        VerificationError: a graph differs from the reference; nothing is written to ``output``.
    """
    say = on_stage if on_stage is not None else lambda text: None
    vocabulary = None if concepts is None else _checked_concepts(model, concepts)
    if tokenizer is not None:
        _check_tokenizer(model, tokenizer)
    with atomic_folder(output, force=force, marker=MANIFEST_NAME) as folder:
        records = export_graphs(model, folder, say)
        report, factor = _verify(model, folder, records, say)
        report.require("the exported graphs differ from the reference, no bundle was written")
        if vocabulary is not None:
            vocabulary.save(folder / CONCEPTS_FILE)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            model=name,
            config=model.config,
            preprocessing=Preprocessing().to_dict(),
            checkpoint=checkpoint,
            tools=tool_versions(),
            graphs={FP32: records},
            files=file_records(folder),
            verification=record_from_json(
                VerificationRecord, report.to_dict() | {"device": machine_title(on_cpu=True)}
            ),
            precisions={} if factor is None else {FP32: PrecisionRecord(noise_factor=factor)},
        )
        (folder / MANIFEST_NAME).write_text(manifest.to_json(), "utf-8")
    return ExportedBundle(bundle=Bundle.open(output, check_hashes=False), report=report)


def export_graphs(
    model: TapModel, folder: pathlib.Path, say: Callable[[str], None]
) -> dict[str, GraphRecord]:
    """Export the three graphs into ``folder``; file names in the records are relative to it."""
    records = {}
    for name, spec in graphs.graph_specs(model.config).items():
        say(f"export {name}")
        file = f"{ONNX_FOLDER}/{FP32}/{name}.onnx"
        records[name] = export_graph(WRAPPERS[name](model), spec, model.config, folder, file)
        gc.collect()  # the traced program holds copies of the weights in reference cycles
    return records


def _verify(
    model: TapModel,
    folder: pathlib.Path,
    records: dict[str, GraphRecord],
    say: Callable[[str], None],
) -> tuple[Report, float | None]:
    """Return the comparison, and by how much the tolerances had to be wider than usual."""
    say("reference outputs")
    samples = golden_samples(
        model, lambda golden: say(f"reference outputs {golden.samples[0].name}")
    )
    say("compare graphs with the reference")
    specs = graphs.graph_specs(model.config)
    with contextlib.ExitStack() as stack:
        sessions = {
            name: stack.enter_context(
                create_session("onnxruntime", folder / record.file, specs[name])
            )
            for name, record in records.items()
        }
        factor = None
        report = _compare(sessions, model, samples, factor)
        if not report.passed:
            factor = max(1.0, NOISE_MARGIN * rounding_noise(model, samples[0]))
            report = _compare(sessions, model, samples, factor)
    (folder / GOLDEN_FILE).parent.mkdir()
    samples[0].save(folder / GOLDEN_FILE)
    return report, factor


def _compare(
    sessions: Mapping[str, Session], model: TapModel, samples: list[Golden], factor: float | None
) -> Report:
    return verify_sessions(
        sessions,
        model.config,
        samples,
        backend="onnxruntime",
        precision=FP32,
        tolerances=tolerances_for(FP32, PrecisionRecord(noise_factor=factor)),
    )


def checkpoint_record(
    file: str, checkpoint: Checkpoint, *, synthetic: bool = False
) -> CheckpointRecord:
    """Return the manifest entry of a checkpoint.

    Args:
        file: name of the file.
        checkpoint: its content.
        synthetic: the weights are synthetic.
    """
    return CheckpointRecord(
        file=printable(file),
        sha256=checkpoint.sha256,
        md5=checkpoint.md5,
        known_as=checkpoint.known_as,
        synthetic=synthetic,
    )


def tool_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that made the bundle."""
    versions = {"tap-deploy": tap_deploy.__version__, "python": platform.python_version()}
    for name in TOOLS:
        versions[name] = importlib.metadata.version(name)
    return versions


def _checked_concepts(model: TapModel, path: str | os.PathLike[str]) -> Vocabulary:
    vocabulary = Vocabulary.load(path)
    expected = model.config.sem_embed_dim
    if vocabulary.weights.shape[0] != expected:
        raise InputError(
            f"concepts {path} have {vocabulary.weights.shape[0]} rows; expected {expected}, "
            "the semantic embedding of this model"
        )
    return vocabulary


def _check_tokenizer(model: TapModel, path: str | os.PathLike[str]) -> None:
    size, expected = Tokenizer(path).vocab_size, model.config.vocab_size
    if size != expected:
        raise InputError(
            f"tokenizer {path} has {size} pieces; expected {expected}, the vocabulary of this model"
        )
