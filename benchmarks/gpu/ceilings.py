"""Step: peak throughput of copies and matrix products on this GPU, by CuPy or torch."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.context import Context, Notes, Skipped
from tap_deploy.optional_modules import load_module

COPY_BYTES = 1 << 28
SIDE = 8192
GEMM_FLOP = 2 * SIDE**3
REPEATS = 10
ROUNDS = 5


def run(context: Context, notes: Notes) -> None:
    """Note GB/s of copies and TFLOP/s of matrix products, the best of ``ROUNDS`` each."""
    device = _device()
    notes.put("by", device.name)
    for name, call, amount in device.candidates():
        with notes.check(name) as found:
            best = min(_seconds(call, device.wait) for _ in range(ROUNDS))
            found["value"] = round(amount / best, 1)
    values = {check["name"]: check.get("value") for check in notes.values["checks"]}
    notes.put("values", values)
    notes.put("headline", ", ".join(f"{name} {value}" for name, value in values.items()))
    notes.require()


def _device() -> _Torch | _Cupy:
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            return _Torch()
    if importlib.util.find_spec("cupy"):
        return _Cupy()
    raise Skipped("torch sees no GPU, and CuPy is not installed; install one of them with CUDA")


def _seconds(call: Callable[[], Any], wait: Callable[[], Any]) -> float:
    """Return the mean seconds per call over ``REPEATS`` calls, after one warm-up call."""
    call()
    wait()
    start = time.perf_counter()
    for _ in range(REPEATS):
        call()
    wait()
    return (time.perf_counter() - start) / REPEATS


class _Torch:
    """Copies and matrix products in torch."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.name = f"torch {torch.__version__}"
        self.wait = torch.cuda.synchronize

    def candidates(self) -> list[tuple[str, Callable[[], Any], float]]:
        torch = self.torch
        host = torch.empty(COPY_BYTES, dtype=torch.uint8).pin_memory()
        left, right = (torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in "ab")
        gigabytes, teraflops = COPY_BYTES / 1e9, GEMM_FLOP / 1e12
        return [
            ("H2D GB/s", lambda: left.copy_(host, non_blocking=True), gigabytes),
            ("D2H GB/s", lambda: host.copy_(left, non_blocking=True), gigabytes),
            ("D2D GB/s", lambda: right.copy_(left), 2 * gigabytes),  # read and write
            ("fp16 TFLOP/s", self._product("float16"), teraflops),
            ("TF32 TFLOP/s", self._product("float32", tf32=True), teraflops),
            ("fp32 TFLOP/s", self._product("float32"), teraflops),
        ]

    def _product(self, dtype: str, *, tf32: bool = False) -> Callable[[], Any]:
        torch = self.torch
        matrices: list[Any] = []

        def call() -> Any:
            if not matrices:
                shape = (SIDE, SIDE)
                matrices.extend(
                    torch.randn(shape, device="cuda", dtype=getattr(torch, dtype)) for _ in "ab"
                )
            torch.backends.cuda.matmul.allow_tf32 = tf32
            return matrices[0] @ matrices[1]

        return call


class _Cupy:
    """Copies and matrix products in CuPy, without TF32, which only an environment variable sets."""

    def __init__(self) -> None:
        cupy: Any = load_module("cupy")
        self.cupy = cupy
        self.name = f"cupy {cupy.__version__}"
        self.wait = cupy.cuda.Device().synchronize

    def candidates(self) -> list[tuple[str, Callable[[], Any], float]]:
        cupy = self.cupy
        memory = cupy.cuda.alloc_pinned_memory(COPY_BYTES)
        left, right = cupy.empty(COPY_BYTES, "uint8"), cupy.empty(COPY_BYTES, "uint8")
        stream = cupy.cuda.Stream.null
        gigabytes, teraflops = COPY_BYTES / 1e9, GEMM_FLOP / 1e12
        up = lambda: left.data.copy_from_host_async(memory.ptr, COPY_BYTES, stream)  # noqa: E731
        down = lambda: left.data.copy_to_host_async(memory.ptr, COPY_BYTES, stream)  # noqa: E731
        across = lambda: right.data.copy_from_device_async(  # noqa: E731
            left.data, COPY_BYTES, stream
        )
        return [
            ("H2D GB/s", up, gigabytes),
            ("D2H GB/s", down, gigabytes),
            ("D2D GB/s", across, 2 * gigabytes),
            ("fp16 TFLOP/s", self._product("float16"), teraflops),
            ("fp32 TFLOP/s", self._product("float32"), teraflops),
        ]

    def _product(self, dtype: str) -> Callable[[], Any]:
        shape, cupy = (SIDE, SIDE), self.cupy
        matrices = [cupy.random.standard_normal(shape, "float32").astype(dtype) for _ in "ab"]
        return lambda: cupy.matmul(*matrices)
