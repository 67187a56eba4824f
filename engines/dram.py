"""DRAM that building and running the engines of a bundle takes: an estimate, item by item."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from tap_deploy.config import TapConfig
from tap_deploy.engines.device_profiles import GIBIBYTE, DeviceProfile
from tap_deploy.engines.forecast import WEIGHT_COPIES
from tap_deploy.engines.roofline import activation_bytes, weight_bytes
from tap_deploy.engines.work import GraphWork
from tap_deploy.graphs import graph_specs, kv_cache_shape
from tap_deploy.precisions import VARIANT_DTYPES
from tap_deploy.sessions.contract import resolve_shape

# Assumed; ``tap-export doctor`` shows what a device has left.
SYSTEM_BYTES = 3 * GIBIBYTE // 2  # Ubuntu without a desktop, and what firmware keeps for itself
RUNTIME_BYTES = 3 * GIBIBYTE // 4  # CUDA context, TensorRT and its kernels, Python
# A plan holds kernels beside its weights: those that TensorRT-RTX 1.7 made of tap_vit_b in fp32
# are larger than their weights by 3 MB (encoder), 8 MB (prompt decoder) and 14 MB (text decoder).
ENGINE_FACTOR = 1.02
ENGINE_FIXED_BYTES = 8_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class DramBudget:
    """What adds up at one time, in bytes.

    Attributes:
        items: description -> bytes.
        available_bytes: DRAM of the device.
    """

    items: dict[str, int]
    available_bytes: int

    @property
    def total_bytes(self) -> int:
        """All items together."""
        return sum(self.items.values())

    @property
    def fits(self) -> bool:
        """Whether the device has as much."""
        return self.total_bytes <= self.available_bytes


def engine_bytes(work: GraphWork, precision: str) -> int:
    """Return the size of a plan file."""
    return int(ENGINE_FACTOR * weight_bytes(work, precision)) + ENGINE_FIXED_BYTES


def build_budget(
    works: Mapping[str, GraphWork], device: DeviceProfile, precision: str, workspace_bytes: int
) -> DramBudget:
    """Return what building takes at its peak, when the largest graph is built.

    Args:
        works: graph name -> work at the largest sizes of the profiles.
        device: where it is built.
        precision: one of ``PRECISIONS``.
        workspace_bytes: the limit of the builder's workspace pool.
    """
    largest = max(weight_bytes(work, precision) for work in works.values())
    activations = max(activation_bytes(work.peak_elements, precision) for work in works.values())
    items = _fixed_items(device) | {
        f"{WEIGHT_COPIES} copies of the weights of the largest graph": WEIGHT_COPIES * largest,
        "workspace": workspace_bytes,
        "activations while kernels are timed": activations,
    }
    return DramBudget(items=items, available_bytes=device.memory_bytes)


def run_budget(
    works: Mapping[str, GraphWork],
    device: DeviceProfile,
    precision: str,
    config: TapConfig,
    max_prompts: int,
) -> DramBudget:
    """Return what a predictor with all three engines takes, at the largest sizes of the profiles.

    Args:
        works: graph name -> work at those sizes.
        device: where it runs.
        precision: one of ``PRECISIONS``.
        config: sizes of the model.
        max_prompts: largest number of prompts in a call.
    """
    cache = activation_bytes(
        math.prod(kv_cache_shape(config, max_prompts, config.text_seq_len)), precision
    )
    items = _fixed_items(device) | {
        "engines": sum(engine_bytes(work, precision) for work in works.values()),
        "activations of the three engines": sum(
            activation_bytes(work.peak_elements, precision) for work in works.values()
        ),
        "inputs and outputs": _binding_bytes(works, config, precision),
        f"KV cache, {max_prompts} prompts": cache,
    }
    return DramBudget(items=items, available_bytes=device.memory_bytes)


def _fixed_items(device: DeviceProfile) -> dict[str, int]:
    system = {"operating system (assumed)": SYSTEM_BYTES} if device.memory_is_shared else {}
    return system | {"CUDA, TensorRT, Python (assumed)": RUNTIME_BYTES}


def _binding_bytes(works: Mapping[str, GraphWork], config: TapConfig, precision: str) -> int:
    total = 0
    for name, spec in graph_specs(config, VARIANT_DTYPES[precision]).items():
        for tensor in (*spec.inputs, *spec.outputs):
            if "T" not in tensor.shape:  # the cache is counted apart
                elements = math.prod(resolve_shape(tensor, works[name].sizes))
                total += elements * (2 if tensor.dtype == "float16" else 4)
    return total
