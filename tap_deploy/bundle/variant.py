"""A variant of a bundle: its graphs, their files and their records."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tap_deploy.bundle.graph_files import load_graph
from tap_deploy.bundle.graph_references import require_listed_data
from tap_deploy.bundle.manifest import FileRecord, GraphRecord
from tap_deploy.config import TapConfig
from tap_deploy.graphs import GraphSpec, graph_specs
from tap_deploy.precisions import VARIANT_DTYPES

if TYPE_CHECKING:
    import onnx_ir as ir


def variant_specs(config: TapConfig, name: str) -> dict[str, GraphSpec]:
    """Return the inputs and outputs of the graphs of a variant, by graph name.

    Args:
        config: sizes of the model.
        name: a key of ``precisions.VARIANT_DTYPES``.
    """
    return graph_specs(config, VARIANT_DTYPES[name])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A variant of a bundle, returned by ``Bundle.variant``.

    It is a snapshot: after a change to the bundle, call ``Bundle.variant`` again.

    Attributes:
        name: key of ``precisions.VARIANT_DTYPES``.
        config: sizes of the model.
        records: graph name -> record of the manifest.
        file_records: graph name -> path -> size and SHA-256. The ONNX file comes first, then its
            external weights, if there are any.
    """

    name: str
    config: TapConfig
    records: Mapping[str, GraphRecord]
    file_records: Mapping[str, Mapping[pathlib.Path, FileRecord]]

    @functools.cached_property
    def specs(self) -> dict[str, GraphSpec]:
        """Inputs and outputs of the graphs, by graph name."""
        return variant_specs(self.config, self.name)

    def files(self, graph: str) -> tuple[pathlib.Path, ...]:
        """Return the ONNX file of a graph and, if present, its external weights."""
        return tuple(self.file_records[graph])

    def path(self, graph: str) -> pathlib.Path:
        """Return the ONNX file of a graph, which a runtime may load.

        Raises:
            BundleError: the graph cannot be read, or refers to a file that is none of ``files``.
        """
        path, *data = self.files(graph)
        require_listed_data(path, [file.name for file in data])
        return path

    def digests(self, graph: str) -> tuple[str, ...]:
        """Return the recorded SHA-256 of each of ``files``."""
        return tuple(record.sha256 for record in self.file_records[graph].values())

    def size_bytes(self, graph: str) -> int:
        """Return the total size of ``files``, bytes."""
        return sum(record.size_bytes for record in self.file_records[graph].values())

    def load(self, graph: str) -> ir.Model:
        """Load a graph as a new model, which the caller may change.

        Models are not cached: a parsed protobuf holds up to 1 GB of weights, which calibration
        frees before its sessions run.

        Raises:
            BundleError: see ``load_graph``.
        """
        return load_graph(self.path(graph))

    def with_graphs(self, folder: pathlib.Path, records: Mapping[str, GraphRecord]) -> Variant:
        """Return this variant with some of its graphs replaced.

        Args:
            folder: folder that the files of the records are relative to.
            records: graph name -> record of the new graph; its files are hashed.
        """
        files = {graph: _hashed(folder, record) for graph, record in records.items()}
        return dataclasses.replace(
            self,
            records={**self.records, **records},
            file_records={**self.file_records, **files},
        )


def _hashed(folder: pathlib.Path, record: GraphRecord) -> dict[pathlib.Path, FileRecord]:
    return {folder / file: FileRecord.of(folder / file) for file in record.files}
