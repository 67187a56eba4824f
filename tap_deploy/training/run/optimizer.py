"""The optimizer: Muon for the matrices inside the model, AdamW for all the rest.

Muon turns the momentum of a matrix into the closest orthogonal one before it is taken as a step,
so that no direction of the matrix learns much more slowly than the others: fewer steps for the
same loss. It is meant for matrices that map features to features; what touches pixels, tokens,
vocabularies, and all vectors stay with AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tap_deploy.training.run.muon import Muon

_BETAS = (0.9, 0.98)  # batches are small, so the second moment should not remember for too long
_MIN_SIDE = 64  # of a matrix inside the model: smaller ones write numbers to read, not features
_READ_OUT = "text_proj"  # as large as the others, yet from features to a vocabulary


class Optimizer:
    """Muon and AdamW as one.

    Args:
        model: TAP. Its linear layers inside are Muon's.
        auxiliary: modules that help training; AdamW's as a whole.
        learning_rate: the highest. Muon's steps are scaled so that they are as long as AdamW's
            usually are, and one learning rate serves both.
        weight_decay: of both.
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
        """The learning rate of the next step."""
        return float(self._adamw.param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        for group in [*self._muon.param_groups, *self._adamw.param_groups]:
            group["lr"] = value

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self._muon.zero_grad(set_to_none=True)
        self._adamw.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Change the weights by their gradients."""
        self._muon.step()
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on."""
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
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
