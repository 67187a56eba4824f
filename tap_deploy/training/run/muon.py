"""Muon in float32, many matrices at a time.

The method is that of ``torch.optim.Muon``: what is taken as a step of a matrix is its momentum
with all singular values brought near 1, by a few steps of a Newton-Schulz iteration. torch
iterates in bfloat16 only. On CPUs without products of that type it emulates them: there 8 of the
10 seconds of a training step went into this, in float32 it is 0.2 s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

_MOMENTUM = 0.95
_ITERATIONS = 5
# Of x, x^3 and x^5: singular values of 0.01 and more come out between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEP_RMS = 0.2  # root mean square of what AdamW usually moves a weight by, in learning rates


class Muon(torch.optim.Optimizer):
    """Orthogonal steps for matrices, as long as those of AdamW at the same learning rate.

    Args:
        matrices: float32 parameters ``[M, N]``.
        lr: learning rate.
        weight_decay: weights shrink by ``lr * weight_decay`` in a step.
    """

    def __init__(self, matrices: Iterable[torch.Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change all matrices that have a gradient."""
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
        """Return the gradient with Nesterov's momentum."""
        state = self.state[matrix]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix)
        momentum = state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        direction: torch.Tensor = gradient.lerp(momentum, _MOMENTUM)
        return direction


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Bring all but the smallest singular values near 1, keeping the directions.

    Args:
        matrices: float32 ``[K, M, N]``.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalized(matrices.mT).mT
    first, third, fifth = _COEFFICIENTS
    norms = torch.linalg.matrix_norm(matrices, keepdim=True)  # no singular value is larger
    x: torch.Tensor = matrices / norms.clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.mT  # [K, M, M]
        x = torch.baddbmm(
            x, torch.baddbmm(square, square, square, beta=third, alpha=fifth), x, beta=first
        )
    return x
