"""Memory estimates for building and running a model's engines.

``MemoryEstimate`` is for any device, also an absent one. ``check_memory`` compares the forecast of
a build with the free memory of this machine, because the kernel's OOM killer gives no explanation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from tap_deploy.config import TapConfig
from tap_deploy.engines.estimate.devices import GIBIBYTE, DeviceProfile
from tap_deploy.engines.estimate.roofline import activation_bytes, weight_bytes
from tap_deploy.engines.estimate.work import GraphWork
from tap_deploy.errors import InputError
from tap_deploy.graphs import graph_specs, kv_cache_shape
from tap_deploy.machine.host import Host
from tap_deploy.machine.memory import linux_memory_of, swap_command
from tap_deploy.precisions import VARIANT_DTYPES
from tap_deploy.sessions.contract import resolve_shape

# The parsed network, its optimised copy, the plan under construction, and the serialized plan.
# Builds on Jetson were seen to take 3 to 4 times the weights.
WEIGHT_COPIES = 4
# Libraries, CUDA context and timed kernels; an allowance, not a measurement.
BASE_BYTES = GIBIBYTE // 2
# Assumed; ``tap-export doctor`` shows the free memory of a device.
SYSTEM_BYTES = 3 * GIBIBYTE // 2  # Ubuntu without a desktop, and memory reserved by firmware
RUNTIME_BYTES = 3 * GIBIBYTE // 4  # CUDA context, TensorRT and its kernels, Python
# A plan also contains kernels: TensorRT-RTX 1.7 plans of tap_vit_b in fp32 exceed their weights by
# 3 MB (encoder), 8 MB (prompt decoder) and 14 MB (text decoder).
ENGINE_FACTOR = 1.02
ENGINE_FIXED_BYTES = 8_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Memory in use at the same time.

    Attributes:
        items: description -> size, bytes.
        available_bytes: DRAM of the device, bytes.
    """

    items: dict[str, int]
    available_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of all items, bytes."""
        return sum(self.items.values())

    @property
    def fits(self) -> bool:
        """Whether the total fits into the device's DRAM."""
        return self.total_bytes <= self.available_bytes


def engine_bytes(work: GraphWork, precision: str) -> int:
    """Return the estimated size of a plan, bytes."""
    return int(ENGINE_FACTOR * weight_bytes(work, precision)) + ENGINE_FIXED_BYTES


def build_estimate(
    works: Mapping[str, GraphWork], device: DeviceProfile, precision: str, workspace_bytes: int
) -> MemoryEstimate:
    """Return the peak memory of a build, reached with the largest graph.

    Args:
        works: graph name -> work at the largest sizes of the profiles.
        device: device that builds.
        precision: one of ``PRECISIONS``.
        workspace_bytes: workspace limit of the builder, bytes.
    """
    largest = max(weight_bytes(work, precision) for work in works.values())
    activations = max(activation_bytes(work.peak_elements, precision) for work in works.values())
    items = _fixed_items(device) | {
        f"{WEIGHT_COPIES} copies of the weights of the largest graph": WEIGHT_COPIES * largest,
        "workspace": workspace_bytes,
        "activations while kernels are timed": activations,
    }
    return MemoryEstimate(items=items, available_bytes=device.memory_bytes)


def run_estimate(
    works: Mapping[str, GraphWork],
    device: DeviceProfile,
    precision: str,
    config: TapConfig,
    max_prompts: int,
    max_points: int,
) -> MemoryEstimate:
    """Return the memory of a predictor with all three engines, at the largest sizes.

    Args:
        works: graph name -> work at the largest sizes of the profiles.
        device: device that runs the engines.
        precision: one of ``PRECISIONS``.
        config: sizes of the model.
        max_prompts: largest number of prompts per call.
        max_points: largest number of points per prompt.
    """
    cache = activation_bytes(
        math.prod(kv_cache_shape(config, max_prompts, config.text_seq_len)), precision
    )
    items = _fixed_items(device) | {
        "engines": sum(engine_bytes(work, precision) for work in works.values()),
        "activations of the three engines": sum(
            activation_bytes(work.peak_elements, precision) for work in works.values()
        ),
        "inputs and outputs": _binding_bytes(config, precision, max_prompts, max_points),
        f"KV cache, {max_prompts} prompts": cache,
    }
    return MemoryEstimate(items=items, available_bytes=device.memory_bytes)


def _fixed_items(device: DeviceProfile) -> dict[str, int]:
    system = {"operating system (assumed)": SYSTEM_BYTES} if device.memory_is_shared else {}
    return system | {"CUDA, TensorRT, Python (assumed)": RUNTIME_BYTES}


def _binding_bytes(config: TapConfig, precision: str, max_prompts: int, max_points: int) -> int:
    sizes = {"B": 1, "P": max_prompts, "N": max_points, "M": 1, "Q": max_prompts, "K": 1}
    total = 0
    for spec in graph_specs(config, VARIANT_DTYPES[precision]).values():
        for tensor in (*spec.inputs, *spec.outputs):
            if "T" not in tensor.shape:  # the cache is a separate item
                elements = math.prod(resolve_shape(tensor, sizes))
                total += elements * (2 if tensor.dtype == "float16" else 4)
    return total


def build_memory_bytes(weights_bytes: int, *, workspace_bytes: int) -> int:
    """Return the forecast of main memory for the build of one graph, bytes.

    Args:
        weights_bytes: size of the graph's weights, bytes.
        workspace_bytes: part of the workspace in main memory, bytes: all of it on Jetson, whose GPU
            shares main memory; 0 elsewhere.
    """
    return BASE_BYTES + WEIGHT_COPIES * weights_bytes + workspace_bytes


def available_memory(host: Host | None = None) -> int | None:
    """Return free memory plus free swap, bytes; None if unknown.

    Does not count zram, the default swap of a Jetson: it uses the same memory, and weights do not
    compress.
    """
    memory = linux_memory_of(Host() if host is None else host)
    return None if memory is None else memory.available_bytes + memory.free_swap_bytes


def check_memory(needed_bytes: int, available_bytes: int | None, precision: str) -> None:
    """Check the forecast of a build in one of ``PRECISIONS`` against the free memory.

    Raises:
        InputError: the forecast exceeds the free memory; the message lists remedies.
    """
    if available_bytes is None or needed_bytes <= available_bytes:
        return
    gib = -(-(needed_bytes - available_bytes) // GIBIBYTE)
    smaller = {"fp32": "--precision fp16, ", "fp16": "--precision int8, "}
    raise InputError(
        f"the build needs about {needed_bytes / GIBIBYTE:.1f} GiB of memory, more than the "
        f"{available_bytes / GIBIBYTE:.1f} GiB of free memory and swap; add swap "
        f"({swap_command(gib)}), close programs, "
        f"try {smaller.get(precision, '')}a smaller --workspace or model, "
        "build on another machine with this GPU and version and copy the bundle's engines, "
        "or pass --force-memory"
    )
