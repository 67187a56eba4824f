"""Initial weights."""

from __future__ import annotations

import torch
from torch import nn

from tap_deploy.config import TapConfig
from tap_deploy.reference.model import TapModel

_TABLE_STD = 0.02  # std of position and token tables; small against the values they are added to


def new_model(config: TapConfig, seed: int) -> TapModel:
    """Return a float32 model on the CPU in training mode, determined by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TapModel(config)
        for module in model.modules():
            _initialize(module)
        model.prompt_encoder.coord_matrix.normal_()  # a buffer, which is not trained
        nn.init.trunc_normal_(model.image_encoder.pos_embed.weight, std=_TABLE_STD)
        nn.init.normal_(model.text_decoder.transformer.tok_embeddings.weight, std=_TABLE_STD)
    return model.train()


def _initialize(module: nn.Module) -> None:
    """Initialise a module so that activations keep their size; others keep torch's default."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
