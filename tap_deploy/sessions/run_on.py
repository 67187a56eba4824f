"""``RunOn``: backend, precision, device, provider and threads for the graphs of a bundle."""

from __future__ import annotations

import dataclasses

from tap_deploy.errors import InputError, SessionError
from tap_deploy.graphs import TEXT_DECODER
from tap_deploy.machine.cpu import usable_cpus
from tap_deploy.precisions import FP16, FP32, GRAPHS_IN_BF16, variant_for
from tap_deploy.sessions.options import CPU, CUDA, Device

ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
# Each graph on what is faster on this CPU, see ``sessions.cpu_choice``.
FASTEST_ON_CPU = "cpu"
# Those that run ONNX files on a CPU.
CPU_BACKENDS = (ONNXRUNTIME, OPENVINO, FASTEST_ON_CPU)
ENGINE_BACKENDS = ("tensorrt", "tensorrt_rtx")
BACKENDS = (*CPU_BACKENDS, *ENGINE_BACKENDS)
# Idle threads of onnxruntime spin, so many threads per CPU make a machine unresponsive.
THREADS_PER_CPU = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOn:
    """Backend, precision and device for the graphs of a bundle.

    Attributes:
        backend: one of ``BACKENDS``.
        precision: one of ``precisions.RUN_PRECISIONS``.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None for the first GPU with engines, and for the
            CPU with the other backends.
        provider: onnxruntime's execution provider on a GPU: ``cuda``, ``tensorrt`` or
            ``nv_tensorrt_rtx``; None for ``cuda``.
        threads: CPU threads per call, only on the CPU; None for one per usable core.
        allow_failed: also load graphs and engines that failed their accuracy check or self-test.
        require_verified: load only graphs and engines that passed a self-test or a verification on
            this machine.

    Raises:
        InputError: a value is invalid, or two of them are incompatible.
        SessionError: the backend is unknown.
    """

    backend: str = ONNXRUNTIME
    precision: str = FP32
    device: str | None = None
    provider: str | None = None
    threads: int | None = None
    allow_failed: bool = False
    require_verified: bool = False

    def __post_init__(self) -> None:
        self._check_threads()
        if self.backend not in BACKENDS:
            raise SessionError(
                f"unknown backend {self.backend!r}; expected one of {', '.join(BACKENDS)}"
            )
        if self.is_engine and self.on_cpu:
            raise InputError(f"backend {self.backend!r} needs a GPU; got device {self.device!r}")
        if self.provider is not None and (self.is_engine or self.on_cpu):
            raise InputError("provider needs backend 'onnxruntime' and device 'cuda'")
        if self.threads is not None and not self.on_cpu:
            raise InputError("threads need device 'cpu'; omit them on a GPU")
        if self.allow_failed and self.require_verified:
            raise InputError("allow_failed and require_verified exclude each other; pass one")
        _ = self.variant  # raises InputError for an unknown precision
        if self.backend in (OPENVINO, FASTEST_ON_CPU):
            self._check_only_cpu()
        elif self.in_bf16:
            raise InputError(
                f"precision {self.precision!r} needs backend '{OPENVINO}' or '{FASTEST_ON_CPU}'; "
                f"got {self.backend!r}"
            )

    @property
    def in_bf16(self) -> bool:
        """Whether image encoder and prompt decoder multiply in bf16."""
        return self.precision in GRAPHS_IN_BF16

    def computes_in_bf16(self, graph: str) -> bool:
        """Whether a graph multiplies in bf16; captions would change too often with bf16."""
        return self.in_bf16 and graph != TEXT_DECODER

    @property
    def is_engine(self) -> bool:
        """Whether TensorRT or TensorRT-RTX runs prebuilt engines."""
        return self.backend in ENGINE_BACKENDS

    @property
    def in_tensorrt(self) -> bool:
        """Whether TensorRT or TensorRT-RTX runs the graphs, also as a provider of onnxruntime."""
        return self.is_engine or self.provider not in (None, CUDA)

    @property
    def words(self) -> list[str]:
        """The options of ``tap-export`` that select this, without defaults."""
        defaults, words = RunOn(), list[str]()
        for name in ("backend", "precision", "device", "provider"):
            value = getattr(self, name)
            if value != getattr(defaults, name):
                words += [f"--{name}", value]
        return words

    @property
    def resolved_device(self) -> Device:
        """The parsed device, with the default of the backend."""
        return Device.from_name(self.device or (CUDA if self.is_engine else CPU))

    @property
    def on_cpu(self) -> bool:
        """Whether the graphs run on the CPU."""
        return self.resolved_device.kind == CPU

    @property
    def variant(self) -> str:
        """The variant for the precision on this device, see ``precisions``."""
        return variant_for(self.precision, on_cpu=self.on_cpu)

    @property
    def mark_name(self) -> str:
        """The key of a self-test result: the backend, with what runs otherwise in it.

        That is onnxruntime's provider on a GPU, and bf16 on a CPU.
        """
        if self.in_bf16:
            return f"{self.backend}-bf16"
        if self.is_engine or self.on_cpu:
            return self.backend
        return f"{self.backend}-{self.provider or CUDA}"

    def _check_only_cpu(self) -> None:
        if not self.on_cpu:
            raise InputError(
                f"backend {self.backend!r} runs on the CPU only; got device {self.device!r}"
            )
        if self.precision == FP16:
            raise InputError(
                f"backend {self.backend!r} has no fp16; use fp32, or bf16 where the CPU has it"
            )

    def _check_threads(self) -> None:
        most = THREADS_PER_CPU * usable_cpus()
        if self.threads is None or (type(self.threads) is int and 1 <= self.threads <= most):
            return
        raise InputError(
            f"threads is {self.threads!r}; expected 1 to {most}, or None for one per core"
        )
