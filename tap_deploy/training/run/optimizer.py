"""The optimizer: Muon for the inner matrices of the model, AdamW for all other parameters.

Muon replaces the momentum of a matrix by the closest orthogonal matrix, so that all directions
learn at a similar rate and the same loss takes fewer steps. It is meant for matrices that map
features to features. Layers that touch pixels, tokens or vocabularies, and all vectors, use AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tap_deploy.training.run.muon import Muon

_BETAS = (0.9, 0.98)  # a short memory of the second moment suits small batches
_MIN_SIDE = 64  # smallest side of an inner matrix; smaller matrices are outputs, not features
_READ_OUT = "text_proj"  # a large matrix, but from features to a vocabulary


class Optimizer:
    """Muon and AdamW as one optimizer.

    Args:
        model: the model; Muon updates its inner linear layers.
        auxiliary: the auxiliary heads, all updated by AdamW.
        learning_rate: learning rate of both. Muon's updates are scaled to the typical size of
            AdamW's.
        weight_decay: weight decay of both.
    """

    def __init__(
        self, model: nn.Module, auxiliary: nn.Module, learning_rate: float, weight_decay: float
    ) -> None:
        matrices = inner_matrices(model)
        inside = {id(matrix) for matrix in matrices}
        rest = [p for p in [*model.parameters(), *auxiliary.parameters()] if id(p) not in inside]
        self._muon = Muon(matrices, lr=learning_rate, weight_decay=weight_decay)
        self._adamw = torch.optim.AdamW(
            rest, lr=learning_rate, betas=_BETAS, weight_decay=weight_decay, fused=True
        )

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self._adamw.param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        for group in [*self._muon.param_groups, *self._adamw.param_groups]:
            group["lr"] = value

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        self._muon.zero_grad(set_to_none=True)
        self._adamw.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Update all weights from their gradients."""
        self._muon.step()
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both optimizers."""
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of ``state_dict``."""
        self._muon.load_state_dict(state["muon"])
        self._adamw.load_state_dict(state["adamw"])


def inner_matrices(model: nn.Module) -> list[torch.Tensor]:
    """Return the weights of the linear layers from features to features, in order."""
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not name.endswith(_READ_OUT)
        and min(module.weight.shape) >= _MIN_SIDE
    ]
