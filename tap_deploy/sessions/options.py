"""Device selection and GPU options."""

from __future__ import annotations

import dataclasses
import pathlib
import re

from tap_deploy.errors import InputError

CPU, CUDA = "cpu", "cuda"
MAX_CONTEXTS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Options for running a model on a GPU.

    Attributes:
        contexts: number of concurrent calls, each with its own stream and buffers; further calls
            wait. onnxruntime also loads the weights once per context.
        eos_interval_steps: caption steps between two polls for EOS, because each poll synchronises
            with the GPU.
        cuda_graphs: record each caption step as a CUDA graph and replay it, if the backend can.
        zero_copy: let the GPU access mapped host memory instead of copying. For boards whose CPU
            and GPU share DRAM; slow on others.
        max_prompts: prompts per call that onnxruntime's buffers hold; engines take theirs from
            the profile.
        max_points: points per prompt that onnxruntime's buffers hold; engines take theirs from
            the profile.
        cache_folder: folder for kernels compiled by TensorRT-RTX, engines built by TensorRT in
            onnxruntime, and graphs compiled by OpenVINO on a CPU; None for
            ``$XDG_CACHE_HOME/tap_deploy`` or ``~/.cache/tap_deploy``.
        tf32: allow onnxruntime to use TF32 (10-bit mantissa) in fp32 matrix products on Ampere and
            later; faster, but fp32 then misses its tolerances. For engines, a build option.

    Raises:
        InputError: invalid value.
    """

    contexts: int = 1
    eos_interval_steps: int = 4
    cuda_graphs: bool = True
    zero_copy: bool = False
    max_prompts: int = 64
    max_points: int = 16
    cache_folder: pathlib.Path | None = None
    tf32: bool = False

    def __post_init__(self) -> None:
        limits = {"contexts": MAX_CONTEXTS, "eos_interval_steps": 1 << 20}
        limits |= {"max_prompts": 4096, "max_points": 4096}
        for name, most in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise InputError(f"{name} is {value!r}; expected 1 to {most}")
        for name in ("cuda_graphs", "zero_copy", "tf32"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} is {getattr(self, name)!r}; expected True or False")


@dataclasses.dataclass(frozen=True)
class Device:
    """A device that runs the graphs.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        index: number of the GPU as CUDA counts it.
    """

    kind: str
    index: int = 0

    @classmethod
    def from_name(cls, name: str) -> Device:
        """Parse ``cpu``, ``cuda`` or ``cuda:1``.

        Raises:
            InputError: unknown device.
        """
        found = re.fullmatch(r"(cpu)|cuda(?::(\d{1,3}))?", name if isinstance(name, str) else "")
        if found is None:
            raise InputError(f"unknown device {name!r}; expected cpu, cuda or cuda:N")
        return cls(CPU) if found[1] else cls(CUDA, int(found[2] or 0))
