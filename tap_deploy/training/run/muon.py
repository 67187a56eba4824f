"""Muon in float32, batched over matrices.

The method is that of ``torch.optim.Muon``: the update of a matrix is its momentum with all
singular values brought close to 1 by a few Newton-Schulz iterations. torch iterates in bfloat16
only, which CPUs without bfloat16 instructions emulate: there it took 8 of the 10 seconds of a
training step, and 0.2 s in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

_MOMENTUM = 0.95
_ITERATIONS = 5
# Coefficients of x, x^3 and x^5: singular values >= 0.01 end between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEP_RMS = 0.2  # typical RMS of AdamW's updates, in units of the learning rate


class Muon(torch.optim.Optimizer):
    """Orthogonalised updates of matrices, as large as those of AdamW at the same learning rate.

    Args:
        matrices: float32 parameters ``[M, N]``.
        lr: learning rate.
        weight_decay: weights shrink by a factor ``1 - lr * weight_decay`` per step.
    """

    def __init__(self, matrices: Iterable[torch.Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            lr, shrink = group["lr"], 1 - group["lr"] * group["weight_decay"]
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            directions: dict[torch.Size, list[torch.Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
                    direction = self._direction(matrix, matrix.grad)
                    directions.setdefault(matrix.shape, []).append(direction)
            for shape, matrices in by_shape.items():
                steps = orthogonalized(torch.stack(directions[shape]))
                length = lr * _STEP_RMS * math.sqrt(max(shape))
                for matrix, step in zip(matrices, steps, strict=True):
                    matrix.mul_(shrink).sub_(step, alpha=length)

    def _direction(self, matrix: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient with Nesterov momentum."""
        state = self.state[matrix]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix)
        momentum = state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        direction: torch.Tensor = gradient.lerp(momentum, _MOMENTUM)
        return direction


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices with all but the smallest singular values brought close to 1.

    Args:
        matrices: float32 ``[K, M, N]``.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalized(matrices.mT).mT
    first, third, fifth = _COEFFICIENTS
    norms = torch.linalg.matrix_norm(matrices, keepdim=True)  # bound of the singular values
    x: torch.Tensor = matrices / norms.clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.mT  # [K, M, M]
        x = torch.baddbmm(
            x, torch.baddbmm(square, square, square, beta=third, alpha=fifth), x, beta=first
        )
    return x
