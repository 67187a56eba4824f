"""The sizes of a model inside each of its graphs, and their comparison with the manifest.

Most sizes show in the inputs and outputs of a graph, but not all: ``text_seq_len`` is only the
number of captioned tokens, and ``encoder_depth`` only the number of blocks.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from tap_deploy.config import TapConfig
from tap_deploy.errors import BundleError
from tap_deploy.storage.json_files import parse_json
from tap_deploy.storage.protobuf import MessageFile

if TYPE_CHECKING:
    import onnx_ir as ir

# Entry of ``ModelProto.metadata_props``: the fields of ``TapConfig`` as JSON. Runtimes ignore it,
# and converters of this project keep it.
CONFIG_KEY = "tap_config"

# Field numbers of the messages of ONNX.
METADATA_PROPS, KEY, VALUE = 14, 1, 2


def write_config(model: ir.Model, config: TapConfig) -> None:
    """Store the sizes in a model."""
    model.metadata_props[CONFIG_KEY] = json.dumps(config.to_dict())


def require_config(path: str | os.PathLike[str], config: TapConfig) -> None:
    """Check that a graph was exported from a model of these sizes.

    Takes less than a millisecond, whatever the size of the file: only its ends are read.

    Raises:
        BundleError: it has other sizes or none, or the file cannot be read.
    """
    try:
        found = _config_in(path)
    except (OSError, ValueError) as exc:
        reason = (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
        raise BundleError(
            f"graph {os.fspath(path)} cannot be read: {reason}; export the bundle again"
        ) from exc
    expected = config.to_dict()
    if found == expected:
        return
    if not isinstance(found, dict):
        raise BundleError(
            f"graph {os.fspath(path)} does not hold the sizes of its model; expected them under "
            f"{CONFIG_KEY!r} in its metadata; export the bundle again"
        )
    names = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
    differences = ", ".join(f"{n} {found.get(n)}, not {expected.get(n)}" for n in names)
    raise BundleError(
        f"graph {os.fspath(path)} is of a model with {differences[:200]} as in the manifest; "
        "export the bundle again"
    )


def _config_in(path: str | os.PathLike[str]) -> Any:
    """Return the JSON value under ``CONFIG_KEY`` in an ONNX file; None without one.

    Raises:
        OSError: see ``open_regular``.
        ValueError: it is not a protobuf message, has too many fields, or the value is no JSON.
    """
    file = MessageFile(path)
    for number, value in file.fields(file.message):
        if number == METADATA_PROPS and not isinstance(value, int):
            entry = {n: bytes(text) for n, text in file.fields(value) if not isinstance(text, int)}
            if entry.get(KEY) == CONFIG_KEY.encode():
                return parse_json(entry.get(VALUE, b""))
    return None
