"""The moving average of the weights, which is evaluated and saved as the model."""

from __future__ import annotations

import copy

import torch
from torch import nn


class WeightAverage:
    """An exponential moving average of a model, in evaluation mode.

    It covers parameters and running statistics of BatchNorm. torch's AveragedModel either keeps
    the statistics of the last batches, or also averages and rounds the integer indices of the
    relative positions.

    Attributes:
        model: the averaged model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        averages = self.model.state_dict()
        self._pairs = [(averages[name], value) for name, value in model.state_dict().items()]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the average by ``1 - decay`` towards the original model; copy integers."""
        for average, value in self._pairs:
            if value.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)
