"""Optional parts of the installation that a command needs."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from tap_deploy.errors import MissingDependencyError

EXPORT_PACKAGES = ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors")
QUANTIZE_PACKAGES = ("onnx", "onnx_ir", "onnxruntime")


def require_export_extra() -> None:
    """Check that PyTorch and the exporters are there.

    Raises:
        MissingDependencyError: one of them is not; the message has the command that brings it.
    """
    _require(EXPORT_PACKAGES, "export")


def require_quantize_extra() -> None:
    """Check that what rewrites and runs ONNX graphs is there; it needs no torch.

    Raises:
        MissingDependencyError: it is not; the message has the command that brings it.
    """
    _require(QUANTIZE_PACKAGES, "quantize")


def _require(packages: Iterable[str], extra: str) -> None:
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as exc:
            raise MissingDependencyError(
                f"this needs {name}, which cannot be imported ({exc}); "
                f'install it with: pip install "tap-deploy[{extra}]"'
            ) from exc
