"""The report of a run as JSON: conditions, candidates, rows, ratios. No single calls."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from tap_deploy.errors import InputError
from tap_deploy.storage.files import atomic_file
from tap_deploy.storage.json_files import read_json

SCHEMA, VERSION = "tap-deploy-bench", 1


def save_report(report: dict[str, Any], path: pathlib.Path) -> None:
    """Write a report.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def load_report(path: pathlib.Path) -> dict[str, Any]:
    """Read a report of ``save_report``.

    Raises:
        InputError: the file cannot be read, or is not a report of this version.
    """
    try:
        values = read_json(path)
    except (OSError, ValueError) as exc:
        raise InputError(
            f"{path} cannot be read as a report: {exc}; write one with: tap-export bench --json"
        ) from exc
    found = (values.get("schema"), values.get("version")) if isinstance(values, dict) else None
    if not isinstance(values, dict) or found != (SCHEMA, VERSION):
        raise InputError(
            f"{path} is not a report of version {VERSION} (schema and version: {found}); write one "
            "with: tap-export bench --json"
        )
    return values


def subject_figures(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the figures of the bundle under test, row -> figures."""
    subject = report["subject"]
    return {row["row"]: row["candidates"][subject] for row in report["rows"]}
