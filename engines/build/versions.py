"""Build-time differences between TensorRT 10.3 … 11.x and TensorRT-RTX.

| | 10.3 | 10.13 | 10.16 | 11.x | RTX |
|---|---|---|---|---|---|
| strong typing | flag, bit 1 | flag, bit 1 | flag, bit 1 | always; the flag is bit 0 | always |
| hardware compatibility | ampere+ | + same-sm | + same-sm | + same-sm | by compute capability |
| version compatibility | yes | yes | yes | yes | no lean runtime: rejected |
| timing cache | yes | yes | yes | yes | deprecated, no effect |
| compute capabilities | the local GPU | ditto | ditto | ditto | selectable, no GPU needed |
| recorded as CUDA graphs | yes | yes | yes | yes | with REQUIRE_USER_ALLOCATION |

Flag values always come from the enumerations, because they differ between versions.
"""

from __future__ import annotations

from typing import Any

from tap_deploy.engines.build.target import AMPERE_PLUS, CURRENT, SAME_SM, BuildTarget
from tap_deploy.errors import InputError, SessionError
from tap_deploy.machine.gpu import Gpu

_HARDWARE_LEVELS = {AMPERE_PLUS: "AMPERE_PLUS", SAME_SM: "SAME_COMPUTE_CAPABILITY"}
_AMPERE = "8.0"
# Compute capabilities of an RTX engine if none is set; later GPUs run it too. Source: "CPU-only
# AOT" in the documentation of TensorRT-RTX.
RTX_DEFAULT = ("8.6", "8.9", "12.0", "12.1")


def create_network(trt: Any, builder: Any) -> Any:
    """Return an empty, strongly typed network, whose precisions come from the ONNX graph."""
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def configure(trt: Any, config: Any, target: BuildTarget) -> None:
    """Apply a target to a builder config, except profiles, progress and timing cache.

    Raises:
        InputError: this version does not support an option of the target.
    """
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, target.workspace_bytes)
    config.builder_optimization_level = target.opt_level
    # Keeps names and data types of layers in the plan, for the inspector.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if has_user_allocation(trt):
        # Without it, contexts may allocate while they run, which prevents recording.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if not target.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if target.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if target.hardware_compatible is not None:
        config.hardware_compatibility_level = _hardware_level(trt, target.hardware_compatible)
    if target.compute_capabilities:
        _set_compute_capabilities(trt, config, target.compute_capabilities)


def built_for(target: BuildTarget, gpu: Gpu | None) -> tuple[tuple[str, ...], str | None]:
    """Return the compute capabilities of a plan, and the lowest one if all later GPUs run it too.

    Raises:
        SessionError: the build needs a GPU and there is none.
    """
    if target.is_rtx and target.compute_capabilities not in ((), (CURRENT,)):
        return target.compute_capabilities, None
    if target.is_rtx and not target.compute_capabilities:
        return RTX_DEFAULT, RTX_DEFAULT[-1]
    if gpu is None:
        remedy = "pass --compute-capability" if target.is_rtx else "build on the device"
        raise SessionError(
            f"{target.backend} builds on the GPU it builds for, and found none; {remedy}"
        )
    lowest = _AMPERE if target.hardware_compatible == AMPERE_PLUS else None
    return (gpu.compute_capability,), lowest


def has_user_allocation(trt: Any) -> bool:
    """Whether this version can build plans whose contexts only use memory given to them."""
    return hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION")


def has_progress_monitor(trt: Any, config: Any) -> bool:
    """Whether a build can report its progress."""
    return hasattr(trt, "IProgressMonitor") and hasattr(config, "progress_monitor")


def _hardware_level(trt: Any, name: str) -> Any:
    level = getattr(trt.HardwareCompatibilityLevel, _HARDWARE_LEVELS[name], None)
    if level is None:
        raise InputError(
            f"TensorRT {trt.__version__} has no hardware compatibility {name!r}; "
            f"use {AMPERE_PLUS}, or leave it out"
        )
    return level


def _set_compute_capabilities(trt: Any, config: Any, capabilities: tuple[str, ...]) -> None:
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        name = CURRENT.upper() if capability == CURRENT else f"SM{capability.replace('.', '')}"
        value = getattr(trt.ComputeCapability, name, None)
        if value is None or not config.set_compute_capability(value, index):
            known = [n for n in dir(trt.ComputeCapability) if n.startswith("SM")]
            raise InputError(
                f"{trt.__name__} {trt.__version__} cannot build for compute capability "
                f"{capability}; it knows {', '.join(known)}"
            )
