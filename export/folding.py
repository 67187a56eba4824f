"""Folds weights before the export, so that the graph has fewer operations."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tap_deploy.config import TEXT_HEAD_DIM


def folded_conv(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return a convolution equal to ``conv`` followed by ``norm`` at inference."""
    return fuse_conv_bn_eval(conv.eval(), norm.eval())


def linear_from_conv(conv: nn.Conv2d) -> nn.Linear:
    """Return a Linear equal to a convolution whose kernel size equals its stride, or is 1.

    It maps patches ``[..., k * k * C_in]``, ordered (dy, dx, channel), to ``[..., C_out]``. Unlike
    a convolution, it runs on tokens in any order, and every builder has fast kernels for it.
    """
    linear = nn.Linear(conv.weight[0].numel(), conv.out_channels, device="meta")
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    assert conv.bias is not None
    linear.bias = nn.Parameter(conv.bias, requires_grad=False)
    return linear


def linear_from_conv_transpose(conv: nn.ConvTranspose2d) -> nn.Linear:
    """Return a Linear equal to a transposed convolution whose kernel size equals its stride.

    Each input pixel then yields a separate block of output pixels, so the layer is a matrix
    product: ``[..., C_in]`` to ``[..., k * k * C_out]``, output ordered (dy, dx, channel). This
    avoids transposing the large map, and every builder has fast kernels for it.
    """
    c_in, c_out, kernel_h, kernel_w = conv.weight.shape
    weight = conv.weight.permute(2, 3, 1, 0).reshape(kernel_h * kernel_w * c_out, c_in)
    linear = nn.Linear(c_in, weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if conv.bias is not None:
        bias = conv.bias.repeat(kernel_h * kernel_w)
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def scaled_queries(qkv: nn.Linear) -> nn.Linear:
    """Return a fused QKV projection with the attention scale folded into the queries.

    The scale is a power of two, so the results stay bit-identical.
    """
    dim = qkv.in_features
    scale = torch.ones(3 * dim)
    scale[:dim] = TEXT_HEAD_DIM**-0.5
    linear = nn.Linear(dim, 3 * dim, device="meta")
    linear.weight = nn.Parameter(qkv.weight * scale[:, None], requires_grad=False)
    linear.bias = nn.Parameter(qkv.bias * scale, requires_grad=False)
    return linear
