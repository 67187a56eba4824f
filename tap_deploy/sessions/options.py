"""How a GPU runs a model: what a user may choose beside backend and precision."""

from __future__ import annotations

import dataclasses
import pathlib
import re

from tap_deploy.errors import InputError

CPU, CUDA = "cpu", "cuda"
MAX_CONTEXTS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Choices for a model on a GPU.

    contexts: calls that may run at once; each has a stream and buffers of its own. Further
        calls wait. onnxruntime also loads the weights once per context.
    eos_interval_steps: caption steps between two polls for EOS; each synchronises with the GPU.
    cuda_graphs: record each caption step once and replay it, where the backend allows it.
    zero_copy: let the GPU read and write mapped host memory in place of copies. Made for boards
        whose CPU and GPU share DRAM; slow elsewhere.
    max_prompts, max_points: buffers of onnxruntime; an engine has them from its profile.
    cache_folder: where TensorRT-RTX keeps what it compiled for this GPU, and TensorRT in
        onnxruntime its engines; None for ``$XDG_CACHE_HOME/tap_deploy`` or
        ``~/.cache/tap_deploy``.
    tf32: let onnxruntime round the factors of fp32 products to 10 bits, which GPUs from Ampere
        on do faster; fp32 then misses its tolerances. Engines decide it when they are built.

    Raises:
        InputError: a value cannot be used.
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
    """``cpu``, or ``cuda`` with the number of a GPU."""

    kind: str
    index: int = 0

    @classmethod
    def from_name(cls, name: str) -> Device:
        """Parse ``cpu``, ``cuda`` or ``cuda:1``.

        Raises:
            InputError: it is none of them.
        """
        found = re.fullmatch(r"(cpu)|cuda(?::(\d{1,3}))?", name if isinstance(name, str) else "")
        if found is None:
            raise InputError(f"unknown device {name!r}; expected cpu, cuda or cuda:N")
        return cls(CPU) if found[1] else cls(CUDA, int(found[2] or 0))
