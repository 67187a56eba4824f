"""Backend, precision, sizes and options of a build."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

from tap_deploy.errors import InputError
from tap_deploy.precisions import FP16, PRECISIONS, variant_for

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt_rtx"
BACKENDS = (TENSORRT, TENSORRT_RTX)
AMPERE_PLUS, SAME_SM = "ampere+", "same-sm"
HARDWARE_COMPATIBILITIES = (AMPERE_PLUS, SAME_SM)
CURRENT = "current"
MAX_OPT_LEVEL = 5
GIB = 1 << 30

_LIMITS = {  # more than any GPU holds, and small enough for the integers of every backend
    "max_images": 1 << 20,
    "max_prompts": 1 << 20,
    "max_points": 1 << 20,
    "workspace_bytes": 1 << 48,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildTarget:
    """Backend, precision, sizes and settings of a build.

    Attributes:
        backend: one of ``BACKENDS``.
        precision: "fp32", "fp16" or "int8" (Q/DQ over fp16).
        max_images: largest batch of the image encoder.
        max_prompts: largest number of prompts, and captions, per call.
        max_points: largest number of points per prompt.
        workspace_bytes: limit on the scratch memory of a layer, bytes.
        timing_cache: timing cache file, read and extended; TensorRT only.
        version_compatible: whether later releases of the major version can load the plan.
        hardware_compatible: "ampere+" or "same-sm" for plans that other GPUs can load, or None.
        compute_capabilities: TensorRT-RTX only: compute capabilities to build for, like "8.6", or
            just "current"; empty for every RTX GPU from Ampere on.
        opt_level: builder optimization level, 0 to 5; higher is slower to build.
        tf32: whether fp32 matrix products may use TF32.

    Raises:
        InputError: invalid value, or an option that the backend does not have.
    """

    backend: str = TENSORRT
    precision: str = FP16
    max_images: int = 1
    max_prompts: int = 64
    max_points: int = 16
    workspace_bytes: int = GIB
    timing_cache: pathlib.Path | None = None
    version_compatible: bool = False
    hardware_compatible: str | None = None
    compute_capabilities: tuple[str, ...] = ()
    opt_level: int = 3
    tf32: bool = False

    def __post_init__(self) -> None:
        _expect_one_of("backend", self.backend, BACKENDS)
        if self.precision not in PRECISIONS:
            raise InputError(
                f"unknown precision {self.precision!r}; expected one of {', '.join(PRECISIONS)}"
            )
        for name, limit in _LIMITS.items():
            if not 1 <= getattr(self, name) <= limit:
                raise InputError(f"{name} is {getattr(self, name)}; expected 1 to {limit}")
        if not 0 <= self.opt_level <= MAX_OPT_LEVEL:
            raise InputError(f"opt_level is {self.opt_level}; expected 0 to {MAX_OPT_LEVEL}")
        if self.hardware_compatible is not None:
            _expect_one_of(
                "hardware_compatible", self.hardware_compatible, HARDWARE_COMPATIBILITIES
            )
        self._check_backend_options()
        self._check_compute_capabilities()

    @property
    def variant(self) -> str:
        """Graph variant that is built; see ``tap_deploy.precisions``."""
        return variant_for(self.precision, on_cpu=False)

    @property
    def is_rtx(self) -> bool:
        """Whether the backend is TensorRT-RTX."""
        return self.backend == TENSORRT_RTX

    def options(self) -> list[str]:
        """Return the options of ``tap-export build`` that differ from its defaults."""
        default, words = BuildTarget(), []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != getattr(default, field.name) and field.name in _OPTIONS:
                words += _OPTIONS[field.name](value)
        return words

    def _check_backend_options(self) -> None:
        rtx_lacks = {
            "hardware_compatible": "--compute-capability selects the GPUs",
            "version_compatible": "its engines only run on the version that built them",
            "timing_cache": "it does not time kernels during the build",
        }
        for name, reason in rtx_lacks.items():
            if self.is_rtx and getattr(self, name):
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{TENSORRT_RTX} has no {option}: {reason}; leave it out")
        if not self.is_rtx and self.compute_capabilities:
            raise InputError(
                f"{TENSORRT} builds for this machine's GPU and does not support "
                f"--compute-capability; leave it out, or pass --hardware-compatible {AMPERE_PLUS}"
            )

    def _check_compute_capabilities(self) -> None:
        for capability in self.compute_capabilities:
            if capability != CURRENT and not re.fullmatch(r"\d+\.\d", capability):
                raise InputError(
                    f"compute capability is {capability!r}; expected one like 8.6, or {CURRENT}"
                )
        if CURRENT in self.compute_capabilities and len(self.compute_capabilities) > 1:
            raise InputError(
                f"compute capability {CURRENT!r} cannot be combined with others; drop them"
            )


def compute_capabilities_from_text(text: str) -> tuple[str, ...]:
    """Parse compute capabilities such as ``86,89``, ``8.6,8.9`` or ``current``.

    Raises:
        InputError: invalid entry.
    """
    words = [word.strip().removeprefix("sm") for word in text.lower().split(",")]
    found = []
    for word in words:
        if not re.fullmatch(rf"{CURRENT}|\d+\.\d|\d{{2,3}}", word):
            raise InputError(
                f"compute capability is {word!r}; expected one like 86 or 8.6, or {CURRENT}"
            )
        found.append(f"{word[:-1]}.{word[-1]}" if word.isdecimal() else word)
    return tuple(dict.fromkeys(found))


def bytes_from_text(text: str) -> int:
    """Parse a size such as ``1GiB``, ``512MiB``, ``2G`` or ``1073741824`` to bytes.

    Raises:
        InputError: not a size.
    """
    units = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
    number = r"\d{1,18}(?:\.\d{1,18})?"
    match = re.fullmatch(rf"({number})\s*([kmg]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise InputError(f"size is {text!r}; expected a number with a unit, like 512MiB or 1GiB")
    return int(float(match.group(1)) * units[match.group(2)])


def _expect_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")


def _word(option: str) -> Any:
    return lambda value: [option, str(value)]


# Without the timing cache, which changes the duration of a build but not the plan.
_OPTIONS: dict[str, Any] = {
    "max_images": _word("--max-images"),
    "max_prompts": _word("--max-prompts"),
    "max_points": _word("--max-points"),
    "workspace_bytes": _word("--workspace"),
    "hardware_compatible": _word("--hardware-compatible"),
    "opt_level": _word("--opt-level"),
    "version_compatible": lambda value: ["--version-compatible"],
    "tf32": lambda value: ["--tf32"],
    "compute_capabilities": lambda value: ["--compute-capability", ",".join(value)],
}
