"""The moving average of the weights: what is evaluated and kept."""

from __future__ import annotations

import copy

import torch
from torch import nn


class WeightAverage:
    """An exponential moving average of a model, in evaluation mode.

    It covers the parameters and the running statistics of BatchNorm alike. torch's own
    AveragedModel would either leave the statistics at those of the last batches, or average
    the integer indices of the relative positions too, and round them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        averages = self.model.state_dict()
        self._pairs = [(averages[name], value) for name, value in model.state_dict().items()]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move by ``1 - decay`` towards the model it was made of; integers are copied."""
        for average, value in self._pairs:
            if value.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)
