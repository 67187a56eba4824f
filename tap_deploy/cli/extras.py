"""Optional parts of the installation that a command needs."""

from __future__ import annotations

import importlib

from tap_deploy.errors import MissingDependencyError


def require_quantize_extra() -> None:
    """Check that what turns fp32 graphs into others is there.

    Raises:
        MissingDependencyError: a package is not; the message has the command that brings it.
    """
    _require(("onnx", "onnx_ir", "onnxruntime"), "quantize")


def require_export_extra() -> None:
    """Check that PyTorch and the exporters are there.

    Raises:
        MissingDependencyError: one of them is not; the message has the command that brings it.
    """
    _require(("torch", "onnx", "onnx_ir", "onnxscript", "safetensors"), "export")


def _require(packages: tuple[str, ...], extra: str) -> None:
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as exc:
            raise MissingDependencyError(
                f"this needs {name}, which cannot be imported ({exc}); "
                f'install it with: pip install "tap-deploy[{extra}]"'
            ) from exc
