"""Optional parts of the installation that a command needs."""

from __future__ import annotations

from tap_deploy.machine.cpu import usable_cores
from tap_deploy.optional_modules import require_module


def require_quantize_extra() -> None:
    """Check that what reads and changes ONNX graphs is there; PyTorch is not needed.

    Raises:
        MissingDependencyError: a package is not; the message has the command that brings it.
    """
    _require(("onnx", "onnx_ir", "onnxruntime", "onnxscript"), "quantize")


def require_export_extra() -> None:
    """Check that PyTorch and the exporters are there, and let PyTorch use the usable cores only.

    Raises:
        MissingDependencyError: one of them is not; the message has the command that brings it.
    """
    _require(("torch", "onnx", "onnx_ir", "onnxscript", "safetensors"), "export")
    import torch

    # By itself it knows of no quota. A smaller number is the user's, by OMP_NUM_THREADS.
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))


def _require(packages: tuple[str, ...], extra: str) -> None:
    for name in packages:
        require_module(name, "this command", extra)
