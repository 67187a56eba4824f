"""What happens to the weights of a graph on their way to fp16."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from tap_deploy.engines.islands import FP16_MAX, SMALLEST_NORMAL, is_float


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightReport:
    """Counts over the float weights of a graph.

    Attributes:
        num_weights: all of them.
        num_fp32: those that stay fp32, because only islands read them.
        num_subnormal: those that become subnormal or zero: stored to 2**-25 absolute, in place
            of 2**-11 of themselves. Harmless beside larger weights of the same tensor; tensors
            with no larger ones stay fp32.
        overflowing: tensors with weights beyond 65504; they stay fp32.
        largest: the largest magnitude that is stored in fp16.
    """

    num_weights: int
    num_fp32: int
    num_subnormal: int
    overflowing: tuple[str, ...]
    largest: float


def weight_report(model: ir.Model, islands: Collection[str]) -> WeightReport:
    """Count what fp16 does to the weights of an fp32 graph, given its islands."""
    counts = dict(num_weights=0, num_fp32=0, num_subnormal=0)
    overflowing, largest = [], 0.0
    for value in model.graph.initializers.values():
        if not is_float(value) or value.const_value is None:
            continue
        magnitude = np.abs(value.const_value.numpy())
        counts["num_weights"] += magnitude.size
        if magnitude.max(initial=0.0) > FP16_MAX:
            overflowing.append(str(value.name))
        if all(node.name in islands for node in value.consumers()):
            counts["num_fp32"] += magnitude.size
            continue
        largest = max(largest, float(magnitude.max(initial=0.0)))
        counts["num_subnormal"] += int(((magnitude > 0) & (magnitude < SMALLEST_NORMAL)).sum())
    return WeightReport(**counts, overflowing=tuple(overflowing), largest=largest)
