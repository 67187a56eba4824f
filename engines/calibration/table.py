"""Calibrated activation ranges of a graph, and the calibration cache file."""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
import sys
from collections.abc import Mapping
from typing import Any

from tap_deploy.errors import InputError
from tap_deploy.storage.files import atomic_file
from tap_deploy.storage.json_files import read_json

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationTable:
    """Calibrated ranges of one graph.

    Attributes:
        graph: name of the graph, one of ``tap_deploy.graphs.GRAPH_NAMES``.
        method: method that chose the ranges, one of ``thresholds.METHODS``.
        ranges: tensor name in the fp32 graph -> amax; larger magnitudes are clipped.
        onnx_sha256: SHA-256 of the fp32 graph.
        data_fingerprint: digest of pictures, their order, prompts and seed.
        num_samples: number of calibration pictures.

    Raises:
        InputError: a range is not a finite number of at least 0.
    """

    graph: str
    method: str
    ranges: Mapping[str, float]
    onnx_sha256: str
    data_fingerprint: str
    num_samples: int

    def __post_init__(self) -> None:
        for name, amax in self.ranges.items():
            # No math.isfinite: it fails on an integer that is too large for a float.
            if not isinstance(amax, (int, float)) or not 0 <= amax <= sys.float_info.max:
                raise InputError(
                    f"calibration of {self.graph}: range of {name} is {reprlib.repr(amax)}; "
                    "expected a finite number of at least 0"
                )

    def require(
        self, *, method: str, onnx_sha256: str, data_fingerprint: str, tensors: set[str]
    ) -> None:
        """Check that this table comes from the same calibration.

        Raises:
            InputError: the table is stale; the message says what differs.
        """
        expected = {
            "method": method,
            "onnx_sha256": onnx_sha256,
            "data_fingerprint": data_fingerprint,
        }
        for key, value in expected.items():
            found = getattr(self, key)
            if found != value:
                raise InputError(
                    f"calibration cache is stale: {self.graph} has {key} {_short(found)}, expected "
                    f"{_short(value)}; delete it, or pass --force to calibrate again"
                )
        missing = sorted(tensors - set(self.ranges))
        if missing:
            raise InputError(
                f"calibration cache is stale: {self.graph} has no range of {missing[0]} "
                f"({len(missing)} are missing); delete it, or pass --force to calibrate again"
            )


def save_tables(path: str | os.PathLike[str], tables: Mapping[str, CalibrationTable]) -> None:
    """Write the tables of several graphs to a JSON file, atomically.

    Raises:
        InputError: the file cannot be written.
    """
    graphs = {name: dataclasses.asdict(table) for name, table in tables.items()}
    text = json.dumps({"schema_version": SCHEMA_VERSION, "tables": graphs}, indent=2)
    with atomic_file(path) as partial:
        partial.write_text(text + "\n", "utf-8")


def load_tables(path: str | os.PathLike[str]) -> dict[str, CalibrationTable]:
    """Load all tables of a calibration cache, by graph name.

    Raises:
        InputError: the file cannot be read, or is not a calibration cache.
    """
    problem = f"calibration cache {os.fspath(path)}"
    try:
        values = read_json(path)
    except (OSError, ValueError) as exc:
        raise InputError(f"{problem} cannot be read as JSON: {exc}; name another file") from exc
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{problem} has schema version {version!r}; expected {SCHEMA_VERSION}; "
            "name another file"
        )
    try:
        return {name: _table(entry) for name, entry in values["tables"].items()}
    except (TypeError, KeyError, AttributeError) as exc:
        raise InputError(
            f"{problem} lacks a field or has one too many ({exc}); name another file"
        ) from exc


def _table(values: dict[str, Any]) -> CalibrationTable:
    ranges = {str(name): amax for name, amax in values["ranges"].items()}
    return CalibrationTable(**(values | {"ranges": ranges}))


def _short(value: str) -> str:
    return value if len(value) <= 12 else f"{value[:12]}…"
