"""Reads the sizes of a model from a file."""

from __future__ import annotations

import pathlib

from tap_deploy.config import TapConfig
from tap_deploy.errors import InputError
from tap_deploy.storage.json_files import read_json


def config_from_file(path: pathlib.Path) -> TapConfig:
    """Read a config from a JSON file: its fields, or an object with them under "config".

    Raises:
        InputError: the file cannot be read, or its fields are not those of a config.
    """
    try:
        values = read_json(path)
    except (OSError, ValueError) as exc:
        raise InputError(f"config {path} cannot be read as JSON: {exc}") from exc
    # A bundle's manifest keeps its config under this key.
    inner = values.get("config", values) if isinstance(values, dict) else values
    return TapConfig.from_dict(inner)
