"""The manifest of a bundle, a JSON file that describes its graphs and files."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shlex
from typing import Any

from tap_deploy.bundle.json_record import json_object, record_from_json, record_to_json
from tap_deploy.bundle.precision_record import PrecisionRecord, VerificationRecord
from tap_deploy.config import Preprocessing, TapConfig
from tap_deploy.errors import BundleError, InputError
from tap_deploy.graphs import GraphSpec, TensorSpec
from tap_deploy.storage.files import sha256_of_file
from tap_deploy.storage.json_files import read_json

SCHEMA_VERSION = 5
MANIFEST_NAME = "manifest.json"
MAX_NAME_BYTES = 255  # of a file or folder, on common file systems


def weights_file(onnx_file: str | os.PathLike[str]) -> str:
    """Return the path of the external weights of an ONNX file."""
    return f"{os.fspath(onnx_file)}.data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and digest of a file.

    Attributes:
        size_bytes: size, bytes.
        sha256: SHA-256, hexadecimal.
    """

    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: pathlib.Path) -> FileRecord:
        """Hash a file and return its record."""
        return cls(size_bytes=path.stat().st_size, sha256=sha256_of_file(path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphRecord:
    """An exported graph.

    Attributes:
        file: path of the ONNX file relative to the bundle, with ``/`` as separator.
        inputs: readable description of each input.
        outputs: readable description of each output.
        opset: ONNX opset version.
        ir_version: ONNX IR version.
        num_nodes: number of nodes.
        op_types: operator -> number of nodes.
        weights_bytes: size of the weights, bytes.
        external_data: whether the weights are in ``weights_file(file)``.
    """

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int
    ir_version: int
    num_nodes: int
    op_types: dict[str, int]
    weights_bytes: int
    external_data: bool

    @property
    def files(self) -> tuple[str, ...]:
        """The ONNX file and, if present, its external weights, relative to the bundle."""
        return (self.file, weights_file(self.file)) if self.external_data else (self.file,)

    @staticmethod
    def describe(spec: GraphSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return readable descriptions of the inputs and outputs of a graph."""
        return _lines(spec.inputs), _lines(spec.outputs)


def _lines(tensors: tuple[TensorSpec, ...]) -> tuple[str, ...]:
    return tuple(str(tensor) for tensor in tensors)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """The weights that a bundle was exported from.

    Attributes:
        file: name of the file.
        sha256: SHA-256 of the file, hexadecimal.
        md5: MD5 of the file, hexadecimal.
        known_as: official file with the same MD5 prefix; None if there is none.
        synthetic: whether the weights are synthetic.
        image_size: image size of the weights, pixels, if the bundle runs them at another one.
    """

    file: str
    sha256: str
    md5: str
    known_as: str | None
    synthetic: bool
    image_size: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        schema_version: ``SCHEMA_VERSION``.
        model: name of the model.
        config: sizes of the model.
        preprocessing: fields of ``Preprocessing``.
        checkpoint: the exported weights.
        tools: package -> version at export.
        graphs: variant, see ``tap_deploy.precisions`` -> graph name -> record.
        files: path relative to the bundle, with ``/`` as separator -> size and digest.
        verification: comparison of the fp32 graphs with PyTorch at export.
        precisions: variant -> how it was made, and its accuracy.
    """

    schema_version: int
    model: str
    config: TapConfig
    preprocessing: dict[str, Any]
    checkpoint: CheckpointRecord
    tools: dict[str, str]
    graphs: dict[str, dict[str, GraphRecord]]
    files: dict[str, FileRecord]
    verification: VerificationRecord
    precisions: dict[str, PrecisionRecord] = dataclasses.field(default_factory=dict)

    @property
    def weights_config(self) -> TapConfig:
        """Sizes of the checkpoint; only its image size may differ from ``config``."""
        trained = self.checkpoint.image_size
        return self.config if trained is None else self.config.at_image_size(trained)

    def precision_record(self, variant: str) -> PrecisionRecord:
        """Return the record of a variant; an empty record if there is none."""
        return self.precisions.get(variant, PrecisionRecord())

    def digests(self, variant: str) -> dict[str, list[str | None]] | None:
        """Return graph name -> SHA-256 of its files; None if the variant does not exist."""
        if variant not in self.graphs:
            return None
        return {
            name: [self.files[file].sha256 if file in self.files else None for file in record.files]
            for name, record in self.graphs[variant].items()
        }

    def to_json(self) -> str:
        """Return the manifest as JSON text."""
        return json.dumps(record_to_json(self), indent=2) + "\n"

    @classmethod
    def read(cls, path: pathlib.Path) -> Manifest:
        """Read and check a manifest file.

        Raises:
            BundleError: it is missing, is not JSON, has another schema version, or is malformed.
        """
        try:
            values = read_json(path)
        except FileNotFoundError as exc:
            raise BundleError(
                f"{path.parent} is not a bundle: {path.name} is missing; "
                "create one with: tap-export export"
            ) from exc
        except (OSError, ValueError) as exc:
            raise BundleError(f"{path} cannot be read as JSON: {exc}; export it again") from exc
        found = values.get("schema_version") if isinstance(values, dict) else None
        if found != SCHEMA_VERSION:
            raise BundleError(
                f"{path} has schema version {found}; this program reads {SCHEMA_VERSION}; "
                + _remedy(path.parent, values, found)
            )
        try:
            return cls._from_values(values)
        except (KeyError, TypeError, AttributeError, InputError) as exc:
            raise BundleError(f"{path} is malformed: {exc}; export it again") from exc

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> Manifest:
        for name in json_object(values["files"]):
            _check_name(name)
        if not Preprocessing().agrees_with(values.get("preprocessing")):
            raise InputError("its preprocessing differs from that of this program")
        return record_from_json(cls, values | {"config": TapConfig.from_dict(values["config"])})


def _check_name(name: str) -> None:
    """Check the path of a listed file.

    Raises:
        InputError: it leads out of the bundle, or is none that this project writes.
    """
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        raise InputError(f"it lists {name[:80]!r}, outside the bundle")
    usual = name.isprintable() and "\\" not in name and not {"", "."} & {*parts}
    if not usual or max(len(part.encode()) for part in parts) > MAX_NAME_BYTES:
        raise InputError(f"it lists {name[:80]!r}, which is not a valid file name")


def _remedy(folder: pathlib.Path, values: Any, version: Any) -> str:
    """Return the remedy for a bundle with another schema version: the export command if known."""
    if isinstance(version, int) and version > SCHEMA_VERSION:
        return "install a newer release of tap-deploy"
    checkpoint = values.get("checkpoint") if isinstance(values, dict) else None
    words = ["tap-export", "export", "--model", str(values.get("model"))] if checkpoint else []
    if not isinstance(checkpoint, dict) or not words:
        return "export it again with: tap-export export"
    words += ["--checkpoint", str(checkpoint.get("file"))]
    for option, name in (("--concepts", "concepts.npz"), ("--tokenizer", "tokenizer.model")):
        if (folder / name).is_file():
            words += [option, str(folder / name)]
    return f"export it again with: {shlex.join([*words, '-o', f'{folder}-{SCHEMA_VERSION}'])}"
