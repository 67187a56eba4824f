"""Optional parts of the installation that a command needs."""

from __future__ import annotations

import importlib

from tap_deploy.errors import MissingDependencyError


def require_export_extra() -> None:
    """Check that PyTorch and the exporters are there.

    Raises:
        MissingDependencyError: one of them is not; the message has the command that brings it.
    """
    for name in ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors"):
        try:
            importlib.import_module(name)
        except ImportError as exc:
            raise MissingDependencyError(
                f"this needs {name}, which cannot be imported ({exc}); "
                'install it with: pip install "tap-deploy[export]"'
            ) from exc
