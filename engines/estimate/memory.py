"""Memory that building and running the engines of a model takes: estimates, made beforehand.

``MemoryEstimate`` is for a device that need not be there. ``check_memory`` looks at what is free
on this machine before a build starts: better than being killed by the kernel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from tap_deploy.cli.doctor.finding import swap_command
from tap_deploy.config import TapConfig
from tap_deploy.engines.estimate.devices import GIBIBYTE, DeviceProfile
from tap_deploy.engines.estimate.roofline import activation_bytes, weight_bytes
from tap_deploy.engines.estimate.work import GraphWork
from tap_deploy.errors import InputError
from tap_deploy.graphs import graph_specs, kv_cache_shape
from tap_deploy.machine.host import Host
from tap_deploy.machine.memory import linux_memory_of
from tap_deploy.precisions import VARIANT_DTYPES
from tap_deploy.sessions.contract import resolve_shape

# The parsed network, the copy that is optimised, the plan that is written, and the plan as bytes.
# On Jetson, 3 to 4 times the weights was seen.
WEIGHT_COPIES = 4
# Libraries, CUDA context and kernels that are tried; an allowance, not a measurement.
BASE_BYTES = GIBIBYTE // 2
# Assumed; ``tap-export doctor`` shows what a device has left.
SYSTEM_BYTES = 3 * GIBIBYTE // 2  # Ubuntu without a desktop, and what firmware keeps for itself
RUNTIME_BYTES = 3 * GIBIBYTE // 4  # CUDA context, TensorRT and its kernels, Python
# A plan holds kernels beside its weights: those that TensorRT-RTX 1.7 made of tap_vit_b in fp32
# are larger than their weights by 3 MB (encoder), 8 MB (prompt decoder) and 14 MB (text decoder).
ENGINE_FACTOR = 1.02
ENGINE_FIXED_BYTES = 8_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
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


def build_estimate(
    works: Mapping[str, GraphWork], device: DeviceProfile, precision: str, workspace_bytes: int
) -> MemoryEstimate:
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
    return MemoryEstimate(items=items, available_bytes=device.memory_bytes)


def run_estimate(
    works: Mapping[str, GraphWork],
    device: DeviceProfile,
    precision: str,
    config: TapConfig,
    max_prompts: int,
    max_points: int,
) -> MemoryEstimate:
    """Return what a predictor with all three engines takes, at the largest sizes of the profiles.

    Args:
        works: graph name -> work at those sizes.
        device: where it runs.
        precision: one of ``PRECISIONS``.
        config: sizes of the model.
        max_prompts: largest number of prompts in a call.
        max_points: largest number of points of a prompt.
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
    sizes, total = {"B": 1, "P": max_prompts, "N": max_points, "M": 1, "K": 1}, 0
    for spec in graph_specs(config, VARIANT_DTYPES[precision]).values():
        for tensor in (*spec.inputs, *spec.outputs):
            if "T" not in tensor.shape:  # the cache is counted apart
                elements = math.prod(resolve_shape(tensor, sizes))
                total += elements * (2 if tensor.dtype == "float16" else 4)
    return total


def build_memory_bytes(weights_bytes: int, *, workspace_bytes: int) -> int:
    """Return the bytes of main memory that the build of one graph is expected to take.

    Args:
        weights_bytes: of the graph.
        workspace_bytes: what the builder takes of it for its workspace: on Jetson, where the GPU
            has no memory of its own, all of the workspace; elsewhere 0.
    """
    return BASE_BYTES + WEIGHT_COPIES * weights_bytes + workspace_bytes


def available_memory(host: Host | None = None) -> int | None:
    """Return the bytes of memory and swap that are free; None where it cannot be known.

    zram, which a Jetson has by default, is no room: it lies in the same memory, and weights do not
    become smaller in it.
    """
    memory = linux_memory_of(Host() if host is None else host)
    return None if memory is None else memory.available_bytes + memory.free_swap_bytes


def check_memory(needed_bytes: int, available_bytes: int | None, precision: str) -> None:
    """Refuse a build, in one of ``PRECISIONS``, that memory will not do for.

    Raises:
        InputError: it takes more than there is. The message says what can be done.
    """
    if available_bytes is None or needed_bytes <= available_bytes:
        return
    gib = -(-(needed_bytes - available_bytes) // GIBIBYTE)
    smaller = {"fp32": "--precision fp16, ", "fp16": "--precision int8, "}
    raise InputError(
        f"the build is expected to take {needed_bytes / GIBIBYTE:.1f} GiB of memory, and "
        f"{available_bytes / GIBIBYTE:.1f} GiB of memory and swap are free; add swap "
        f"({swap_command(gib)}), close programs, "
        f"try {smaller.get(precision, '')}a smaller --workspace or model, "
        "build on another machine with this GPU and version and copy the bundle's engines, "
        "or pass --force-memory"
    )
