"""The optimizer: assignment of parameters, and the update of Muon."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from tap_deploy.config import DEMO, VARIANTS
from tap_deploy.training.run.initialize import new_model
from tap_deploy.training.run.muon import Muon, orthogonalized
from tap_deploy.training.run.optimizer import Optimizer, inner_matrices


class Small(nn.Module):
    """One matrix inside, one that reads a vocabulary, a small one and a table."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Linear(64, 96)
        self.text_proj = nn.Linear(96, 128)
        self.small = nn.Linear(96, 4)
        self.table = nn.Embedding(100, 64)


def test_muon_takes_the_linear_layers_inside():
    model = new_model(VARIANTS[DEMO], 0)
    taken = {id(p) for p in inner_matrices(model)}
    names = {name for name, p in model.named_parameters() if id(p) in taken}
    assert "image_encoder.blocks.3.mlp.fc1.weight" in names
    assert "image_decoder.transformer.blocks.1.self_attn.q_proj.weight" in names
    assert "text_decoder.encoder.weight" in names
    outside = (
        "bias",
        "embed",
        "iou_token",
        "_tokens.",
        "norm",
        "text_proj",
        "conv",
        "mask_pred.0.layers.2",
    )
    assert not [name for name in names if any(word in name for word in outside)]
    assert sum(p.numel() for p in inner_matrices(model)) > 0.8 * sum(
        p.numel() for p in model.parameters()
    )


def test_every_parameter_is_stepped_once():
    model, auxiliary = Small(), nn.Linear(64, 64)
    optimizer = Optimizer(model, auxiliary, learning_rate=0.01, weight_decay=0.1)
    parameters = [*model.parameters(), *auxiliary.parameters()]
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(parameters, before, strict=True):  # nothing but the decay, once
        torch.testing.assert_close(p.detach(), old * (1 - 0.01 * 0.1))
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters)


def test_a_step_of_a_matrix_is_nearly_orthogonal_and_as_long_as_asked():
    model = Small()
    optimizer = Optimizer(model, nn.Linear(2, 2), learning_rate=0.01, weight_decay=0.0)
    before = model.inside.weight.detach().clone()
    scales = torch.logspace(0, -2, 64)  # a gradient whose directions differ a hundredfold
    model.inside.weight.grad = torch.linalg.qr(torch.randn(96, 64))[0] * scales
    optimizer.step()
    step = model.inside.weight.detach() - before
    singular = torch.linalg.svdvals(step)
    assert singular.max() < 2.5 * singular.min()
    assert step.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.2)


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (80, 160)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    singular = torch.linalg.svdvals(orthogonalized(matrices))
    assert singular.min() > 0.6 and singular.max() < 1.25
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    diagonal = left.mT @ orthogonalized(matrices) @ right.mT
    off = diagonal - torch.diag_embed(torch.diagonal(diagonal, dim1=1, dim2=2))
    assert off.abs().max() < 1e-4
    assert torch.equal(orthogonalized(torch.zeros(1, *shape)), torch.zeros(1, *shape))


def test_muon_steps_as_that_of_torch_does():
    """torch iterates in bfloat16 with an 8-bit mantissa, so updates differ by 1 %."""
    torch.manual_seed(0)
    starts = [torch.randn(64, 96), torch.randn(96, 64), torch.randn(64, 96)]
    ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizers = (
        Muon(ours, lr=0.01, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for one, two in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            two.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, two, start in zip(ours, theirs, starts, strict=True):
        moved = (two - start).norm()
        assert (one - two).norm() < 0.02 * moved, (one - two).norm() / moved


def test_the_learning_rate_of_both():
    model = Small()
    optimizer = Optimizer(model, nn.Linear(2, 2), learning_rate=0.01, weight_decay=0.0)
    optimizer.learning_rate = 0.0
    assert optimizer.learning_rate == 0
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_state_holds_all_that_the_next_step_needs():
    steps = []
    for resumed in (False, True):
        model, auxiliary = Small(), nn.Linear(3, 3)
        optimizer = Optimizer(model, auxiliary, learning_rate=0.01, weight_decay=0.1)
        for step in range(4):
            if resumed and step == 2:
                state = optimizer.state_dict()
                optimizer = Optimizer(model, auxiliary, learning_rate=0.01, weight_decay=0.1)
                optimizer.load_state_dict(state)
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        steps.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))
