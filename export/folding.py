"""Weights that change shape on the way to ONNX, so that the graph has less to do."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tap_deploy.config import TEXT_HEAD_DIM


def folded_conv(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return a convolution that does what ``conv`` and then ``norm`` do at inference."""
    return fuse_conv_bn_eval(conv.eval(), norm.eval())


def linear_from_conv_transpose(conv: nn.ConvTranspose2d) -> nn.Linear:
    """Return a Linear equal to a transposed convolution whose kernel equals its stride.

    Every input pixel then makes its own block of output pixels, which is a matrix product:
    ``[..., C_in]`` to ``[..., k * k * C_out]``, output ordered (dy, dx, channel). It needs no
    transposition of the large map, and every builder has fast kernels for it.
    """
    c_in, c_out, kernel_h, kernel_w = conv.weight.shape
    weight = conv.weight.permute(2, 3, 1, 0).reshape(kernel_h * kernel_w * c_out, c_in)
    linear = nn.Linear(c_in, weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if conv.bias is not None:
        bias = conv.bias.repeat(kernel_h * kernel_w)
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def half_split_qkv(qkv: nn.Linear) -> nn.Linear:
    """Reorder the q and k rows of a fused projection from interleaved to half-split pairs.

    The rotary embedding turns the pairs (2i, 2i + 1). With every head's channels reordered
    to (0, 2, 4, … 1, 3, 5, …) the pair is (i, i + head_dim / 2), and the rotation needs two
    slices and a Concat instead of strided gathers. Products of q and k do not change when
    both are reordered alike; v keeps its order.
    """
    order = torch.cat([torch.arange(0, TEXT_HEAD_DIM, 2), torch.arange(1, TEXT_HEAD_DIM, 2)])
    dim = qkv.in_features
    heads = torch.arange(2 * dim // TEXT_HEAD_DIM)[:, None] * TEXT_HEAD_DIM
    rows = torch.cat([(heads + order).flatten(), torch.arange(2 * dim, 3 * dim)])
    linear = nn.Linear(dim, 3 * dim, device="meta")
    linear.weight = nn.Parameter(qkv.weight[rows], requires_grad=False)
    linear.bias = nn.Parameter(qkv.bias[rows], requires_grad=False)
    return linear
