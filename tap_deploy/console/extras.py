"""Checks for the extras that a command needs."""

from __future__ import annotations

from tap_deploy.machine.cpu import usable_cores
from tap_deploy.optional_modules import require_module


def require_quantize_extra() -> None:
    """Check that the packages that change ONNX graphs, and the one that writes reports, are there.

    Raises:
        MissingDependencyError: one of them is not; the message has the command to install it.
    """
    _require(("onnx", "onnx_ir", "onnxruntime", "onnxscript", "jinja2"), "quantize")


def require_export_extra() -> None:
    """Check that PyTorch and the exporters are installed; limit PyTorch to the usable cores.

    Raises:
        MissingDependencyError: one of them is not; the message has the command to install it.
    """
    _require(("torch", "onnx", "onnx_ir", "onnxscript", "safetensors"), "export")
    import torch

    # PyTorch ignores CPU quotas. A smaller number comes from the user, by OMP_NUM_THREADS.
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))


def require_serve_extra() -> None:
    """Check that the packages of the server are there.

    Raises:
        MissingDependencyError: one of them is not; the message has the command to install it.
    """
    _require(("fastapi", "uvicorn", "prometheus_client", "python_multipart", "shapely"), "serve")


def _require(packages: tuple[str, ...], extra: str) -> None:
    for name in packages:
        require_module(name, "this command", extra)
