"""Weights to start from."""

from __future__ import annotations

import torch
from torch import nn

from tap_deploy.config import TapConfig
from tap_deploy.reference.model import TapModel

_TABLE_STD = 0.02  # of tables of positions and text tokens, small beside what is added to them


def new_model(config: TapConfig, seed: int) -> TapModel:
    """Return a float32 model on the CPU, ready to be trained; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TapModel(config)
        for module in model.modules():
            _initialize(module)
        model.prompt_encoder.coord_matrix.normal_()  # a buffer: drawn once, never trained
        nn.init.trunc_normal_(model.image_encoder.pos_embed.weight, std=_TABLE_STD)
        nn.init.normal_(model.text_decoder.transformer.tok_embeddings.weight, std=_TABLE_STD)
    return model.train()


def _initialize(module: nn.Module) -> None:
    """Keep the size of activations; what is not named keeps the default of torch."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
