"""Who can witness for fp16 on a machine without a GPU?"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Callable, Mapping

from tap_deploy.errors import InputError, MissingDependencyError
from tap_deploy.graphs import GraphSpec
from tap_deploy.sessions.contract import Session

TORCH_HALF = "torch-half"
ONNX_REFERENCE = "onnx-reference"
# onnx's reference evaluator multiplies fp16 matrices element by element: minutes for a model of
# this size, days for a published one.
REFERENCE_LIMIT_BYTES = 40_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Sessions that round to fp16 after every node, by graph name, and what they run on."""

    name: str
    sessions: Mapping[str, Session]


def rounding_evaluator(
    paths: Mapping[str, pathlib.Path], specs: Mapping[str, GraphSpec], name: str | None = None
) -> Evaluator | None:
    """Load graphs into an evaluator that rounds to fp16 after every node.

    Args:
        paths: ONNX file per graph name.
        specs: what each takes and gives.
        name: ``TORCH_HALF`` or ``ONNX_REFERENCE``; None for torch where it is installed, else
            onnx's for models that are small enough.

    Returns:
        the evaluator, or None where nothing suitable is installed and no name was given.

    Raises:
        InputError: there is no such evaluator.
        MissingDependencyError: the one that was asked for is not installed.
        SessionError: a graph has an operator that the evaluator does not know.
    """
    if name is None:
        name = _best(paths)
    if name is None:
        return None
    load = _session_class(name)
    return Evaluator(
        name=name, sessions={graph: load(paths[graph], spec) for graph, spec in specs.items()}
    )


def _session_class(name: str) -> Callable[[pathlib.Path, GraphSpec], Session]:
    try:
        if name == TORCH_HALF:
            from tap_deploy.engines.half_evaluator import TorchHalfSession

            return TorchHalfSession
        if name == ONNX_REFERENCE:
            from tap_deploy.engines.reference_evaluator import OnnxReferenceSession

            return OnnxReferenceSession
    except ImportError as exc:
        raise MissingDependencyError(
            f"evaluator {name!r} is not installed ({exc}); "
            'install it with: pip install "tap-deploy[export]"'
        ) from exc
    raise InputError(f"unknown evaluator {name!r}; expected {TORCH_HALF} or {ONNX_REFERENCE}")


def _best(paths: Mapping[str, pathlib.Path]) -> str | None:
    installed = {
        name: importlib.util.find_spec(name) is not None for name in ("torch", "onnx_ir", "onnx")
    }
    if installed["torch"] and installed["onnx_ir"]:
        return TORCH_HALF
    if not installed["onnx"]:
        return None
    size = sum(os.path.getsize(path) for path in paths.values())
    return ONNX_REFERENCE if size <= REFERENCE_LIMIT_BYTES else None
