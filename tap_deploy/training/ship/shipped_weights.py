"""Weights as they are shipped: float16 where a model can bear it, nothing that can be derived."""

from __future__ import annotations

from pathlib import Path

import torch

from tap_deploy.errors import CheckpointError
from tap_deploy.reference.checkpoint import save_checkpoint
from tap_deploy.reference.model import TapModel
from tap_deploy.reference.state import COUNTER_SUFFIX, INDEX_SUFFIX


def shipped_state(model: TapModel) -> dict[str, torch.Tensor]:
    """Return the entries to ship: parameters in float16, buffers in float32.

    Indices of relative positions and counters of batches are left out, ``load_checkpoint`` makes
    them anew. Buffers (statistics of BatchNorm, Fourier frequencies, pixel means) are a tenth of
    a percent of all numbers, and worth their digits.

    Raises:
        CheckpointError: a weight is too large for float16.
    """
    parameters = dict(model.named_parameters())
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith((INDEX_SUFFIX, COUNTER_SUFFIX)):
            continue
        state[name] = value.half() if name in parameters else value
        if not torch.isfinite(state[name]).all():
            raise CheckpointError(
                f"entry {name} reaches {float(value.abs().max()):g}; expected at most 65504, the "
                "largest float16: train with more weight decay"
            )
    return state


def write_shipped_weights(model: TapModel, path: Path) -> None:
    """Write ``shipped_state`` as safetensors."""
    save_checkpoint(shipped_state(model), path)
