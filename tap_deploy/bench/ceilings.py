"""Ceilings of the machine, measured on the spot: a large matrix product and a large copy.

On a CPU, ``python -m tap_deploy.bench.ceilings`` measures them with NumPy in a process of its own,
because the number of BLAS threads is fixed when NumPy is imported.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tap_deploy.errors import InputError, SessionError, first_line
from tap_deploy.machine.cpu import usable_cores
from tap_deploy.optional_modules import load_module

PROGRAM = "tap_deploy.bench.ceilings"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
CPU_SIDE, CPU_COPY_BYTES = 2048, 1 << 28
GPU_SIDE, GPU_COPY_BYTES = 8192, 1 << 28
CPU_REPEATS, GPU_REPEATS, ROUNDS = 1, 10, 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Best of several rounds.

    Attributes:
        by: package that measured them, with its version.
        flops: precision -> operations per second of a matrix product.
        bytes_per_second: bytes read and written per second by a copy.
    """

    by: str
    flops: dict[str, float]
    bytes_per_second: float

    @classmethod
    def best(cls, one: Ceilings, other: Ceilings) -> Ceilings:
        """Return the higher ceilings of two measurements by the same package."""
        names = {**one.flops, **other.flops}
        return cls(
            by=one.by,
            flops={n: max(one.flops.get(n, 0.0), other.flops.get(n, 0.0)) for n in names},
            bytes_per_second=max(one.bytes_per_second, other.bytes_per_second),
        )


def cpu_ceilings(threads: int | None, *, with_torch: bool = False) -> Ceilings:
    """Measure this CPU.

    Args:
        threads: CPU threads; None for one per usable core.
        with_torch: also measure a bfloat16 product, with torch.

    Raises:
        SessionError: the measuring process failed.
    """
    count = threads or usable_cores()
    result = subprocess.run(
        [sys.executable, "-m", PROGRAM, str(count), *["torch"] * with_torch],
        env=os.environ | dict.fromkeys(THREAD_VARIABLES, str(count)),
        capture_output=True,
        text=True,
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        raise SessionError(f"ceilings: {lines[-1] if lines else 'the process died'}")
    return Ceilings(**json.loads(result.stdout))


def gpu_ceilings(index: int = 0) -> Ceilings:
    """Measure a GPU with torch or CuPy.

    Raises:
        InputError: neither is installed with CUDA.
        SessionError: a product or copy failed.
    """
    device = gpu_device(index)
    values = {}
    for name, call, amount in device.candidates():
        try:
            values[name] = amount / best_seconds(call, device.wait, GPU_REPEATS)
        except Exception as exc:  # torch and CuPy have no common base class
            raise SessionError(f"ceilings: {name} failed: {first_line(exc)}") from exc
    flops = {
        precision: 1e12 * values[f"{name} TFLOP/s"]
        for precision, name in (("fp16", "fp16"), ("bf16", "bf16"), ("fp32", "fp32"))
        if f"{name} TFLOP/s" in values
    }
    return Ceilings(by=device.name, flops=flops, bytes_per_second=1e9 * values["D2D GB/s"])


def gpu_device(index: int = 0) -> TorchDevice | CupyDevice:
    """Return the package that can use a GPU.

    Raises:
        InputError: there is none.
    """
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            return TorchDevice(index)
    if importlib.util.find_spec("cupy"):
        return CupyDevice(index)
    raise InputError("torch sees no GPU, and CuPy is not installed; install one of them with CUDA")


def best_seconds(call: Callable[[], Any], wait: Callable[[], Any], repeats: int) -> float:
    """Return the seconds per call of the best of ``ROUNDS`` rounds, after a warm-up call."""
    call()
    wait()
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        best = min(best, (time.perf_counter() - start) / repeats)
    return best


Measured = tuple[str, Callable[[], Any], float]


class TorchDevice:
    """Copies and matrix products in torch on a GPU."""

    def __init__(self, index: int = 0) -> None:
        import torch

        self.torch, self._device = torch, f"cuda:{index}"
        self.name = f"torch {torch.__version__}"

    def wait(self) -> None:
        """Wait for the GPU."""
        self.torch.cuda.synchronize(self._device)

    def candidates(self) -> Iterator[Measured]:
        """Yield name, call and amount of work: 1e9 bytes, or 1e12 operations."""
        torch = self.torch
        host = torch.empty(GPU_COPY_BYTES, dtype=torch.uint8).pin_memory()
        left, right = (
            torch.empty(GPU_COPY_BYTES, dtype=torch.uint8, device=self._device) for _ in "ab"
        )
        gigabytes = GPU_COPY_BYTES / 1e9
        yield "H2D GB/s", lambda: left.copy_(host, non_blocking=True), gigabytes
        yield "D2H GB/s", lambda: host.copy_(left, non_blocking=True), gigabytes
        yield "D2D GB/s", lambda: right.copy_(left), 2 * gigabytes  # read and write
        for name in ("fp16", "bf16", "TF32", "fp32"):
            yield f"{name} TFLOP/s", self._product(name), 2e-12 * GPU_SIDE**3

    def _product(self, name: str) -> Callable[[], Any]:
        torch = self.torch
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(name, torch.float32)
        shape = (GPU_SIDE, GPU_SIDE)
        matrices = [torch.randn(shape, device=self._device, dtype=dtype) for _ in "ab"]

        def call() -> Any:
            torch.backends.cuda.matmul.allow_tf32 = name == "TF32"
            result = matrices[0] @ matrices[1]
            torch.backends.cuda.matmul.allow_tf32 = False
            return result

        return call


class CupyDevice:
    """Copies and products in CuPy, without TF32, which only an environment variable sets."""

    def __init__(self, index: int = 0) -> None:
        cupy: Any = load_module("cupy")
        cupy.cuda.Device(index).use()
        self.cupy = cupy
        self.name = f"cupy {cupy.__version__}"
        self.wait = cupy.cuda.Device().synchronize

    def candidates(self) -> Iterator[Measured]:
        """Yield name, call and amount of work: 1e9 bytes, or 1e12 operations."""
        cupy, count = self.cupy, GPU_COPY_BYTES
        memory = cupy.cuda.alloc_pinned_memory(count)
        left, right = cupy.empty(count, "uint8"), cupy.empty(count, "uint8")
        stream, gigabytes = cupy.cuda.Stream.null, count / 1e9
        up = lambda: left.data.copy_from_host_async(memory.ptr, count, stream)  # noqa: E731
        down = lambda: left.data.copy_to_host_async(memory.ptr, count, stream)  # noqa: E731
        across = lambda: right.data.copy_from_device_async(left.data, count, stream)  # noqa: E731
        yield "H2D GB/s", up, gigabytes
        yield "D2H GB/s", down, gigabytes
        yield "D2D GB/s", across, 2 * gigabytes
        for name, dtype in (("fp16", "float16"), ("fp32", "float32")):
            yield f"{name} TFLOP/s", self._product(dtype), 2e-12 * GPU_SIDE**3

    def _product(self, dtype: str) -> Callable[[], Any]:
        shape, cupy = (GPU_SIDE, GPU_SIDE), self.cupy
        matrices = [cupy.random.standard_normal(shape, "float32").astype(dtype) for _ in "ab"]
        return lambda: cupy.matmul(*matrices)


def main(arguments: list[str]) -> None:
    """Measure the CPU with the threads of the environment, and print JSON."""
    threads = int(arguments[0])
    rng = np.random.default_rng(0)
    left, right = (rng.random((CPU_SIDE, CPU_SIDE), np.float32) for _ in "ab")
    out = np.empty_like(left)
    operations = 2 * CPU_SIDE**3
    product = best_seconds(lambda: np.matmul(left, right, out=out), _no_wait, CPU_REPEATS)
    found = Ceilings(
        by=f"numpy {np.__version__}, {threads} threads",
        flops={"fp32": operations / product},
        bytes_per_second=2 * CPU_COPY_BYTES / _copy_seconds(threads),
    )
    if "torch" in arguments[1:]:
        found.flops["bf16"] = operations / _bfloat16_seconds(threads)
    print(json.dumps(dataclasses.asdict(found)))


def _copy_seconds(threads: int) -> float:
    """Return the seconds to copy an array, a part per thread; NumPy releases the GIL."""
    source, target = (np.ones(CPU_COPY_BYTES // 4, np.float32) for _ in "ab")
    parts = [*zip(np.array_split(target, threads), np.array_split(source, threads), strict=True)]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return best_seconds(
            lambda: [*pool.map(lambda part: np.copyto(*part), parts)], _no_wait, CPU_REPEATS
        )


def _bfloat16_seconds(threads: int) -> float:
    import torch

    torch.set_num_threads(threads)
    left, right = (torch.rand(CPU_SIDE, CPU_SIDE).bfloat16() for _ in "ab")
    return best_seconds(lambda: left @ right, _no_wait, CPU_REPEATS)


def _no_wait() -> None: ...


if __name__ == "__main__":
    main(sys.argv[1:])
