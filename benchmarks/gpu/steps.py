"""The steps, most important first, in case time is short."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu.context import Context, Notes
from benchmarks.gpu.machine import GPU

RUNTIME = ("numpy", "PIL", "click", "sentencepiece", "onnxruntime")
CUDA = "cuda|pycuda"
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
EXPORT = ("torch", "onnx", "onnxscript", "onnx_ir")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A step, run in its own process.

    Attributes:
        name: name; the part before the first dash is the group.
        title: short description.
        limit_s: time limit, seconds; the step is killed after it.
        min_s: the step is not started with less time left, seconds.
        needs: requirements, see ``machine.missing``.
        after: steps that it depends on; they run first.
        function: ``module:function``, called with ``Context``, ``Notes`` and ``options``.
        options: further arguments of the function.
        environment: environment variables of its process.
        asked_for: run only by name or with ``--against``.
    """

    name: str
    title: str
    limit_s: float
    min_s: float = 5
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    function: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    asked_for: bool = False

    @property
    def group(self) -> str:
        """Name of the group of steps that it belongs to."""
        return self.name.split("-")[0]

    @property
    def uses_gpu(self) -> bool:
        """Whether the step tests a GPU; making bundles does not count."""
        return GPU in self.needs and self.group != "bundle"

    def call(self, context: Context, notes: Notes) -> None:
        """Run the step in this process."""
        module, _, name = self.function.partition(":")
        function: Callable[..., None] = getattr(importlib.import_module(module), name)
        function(context, notes, **self.options)


def _here(module: str, function: str) -> str:
    return f"benchmarks.gpu.{module}:{function}"


def _parity(name: str, precision: str, *, tf32: bool = False) -> Step:
    return Step(
        name=f"parity-{name}",
        title=f"micro bundle, {name}: reference, CPU, order, contexts, memory",
        limit_s=60,
        min_s=10,
        needs=(GPU, *RUNTIME, CUDA),
        after=("bundle-micro",),
        function=_here("parity", "run"),
        options={"precision": precision, "tf32": tf32},
    )


def _latency(name: str, precision: str, *, tf32: bool = False) -> Step:
    return Step(
        name=f"latency-{name}",
        title=f"tap_vit_b {name}: every stage, with and without CUDA graphs",
        limit_s=90,
        min_s=20,
        needs=(GPU, *RUNTIME, CUDA),
        after=("bundle-tap_vit_b",),
        function=_here("latency", "run"),
        options={"precision": precision, "tf32": tf32},
    )


def _torch(name: str, mode: str, limit_s: float = 60) -> Step:
    return Step(
        name=f"torch-{name}",
        title=f"PyTorch {name}: the same stages with the same weights",
        limit_s=limit_s,
        min_s=20,
        needs=(GPU, *RUNTIME[:-1], "torch"),
        function=_here("pytorch", "run"),
        options={"mode": mode},
        asked_for=True,
    )


def _engines(name: str) -> Step:
    return Step(
        name=f"engines-{name}",
        title=f"{name}: build, self-test and latency of its engines",
        limit_s=180,
        min_s=30,
        needs=(GPU, *RUNTIME[:-1], CUDA, name),
        after=("bundle-micro", "bundle-tap_vit_b"),
        function=_here("engines", "run"),
        options={"backend": name},
    )


def _tests(
    name: str, title: str, limit_s: float, *, after: tuple[str, ...] = (), **options: Any
) -> Step:
    return Step(
        name=name,
        title=title,
        limit_s=limit_s,
        needs=(GPU, *RUNTIME, CUDA, "pytest"),
        after=after,
        function=_here("suite", "run"),
        options=options,
    )


def _host(threads: int) -> Step:
    return Step(
        name=f"host-{threads}",
        title=f"host work for 47 regions at 1920x1080, NumPy threads: {threads}",
        limit_s=45,
        needs=RUNTIME[:-1],
        function=_here("host", "run"),
        options={"threads": threads},
        environment={name: str(threads) for name in THREAD_VARIABLES},
    )


LAYER = "tests/test_gpu_cuda_layer.py"

STEPS = (
    Step(
        name="versions",
        title="installed packages and state of the GPU",
        limit_s=30,
        min_s=2,
        needs=("numpy",),
        function=_here("versions", "run"),
    ),
    Step(
        name="ceilings",
        title="peak throughput of copies and matrix products",
        limit_s=45,
        needs=(GPU, "numpy", "cupy|torch"),
        function=_here("ceilings", "run"),
    ),
    Step(
        name="provider",
        title="one MatMul on onnxruntime's CUDA provider",
        limit_s=45,
        needs=(GPU, "numpy", "onnxruntime", "onnx"),
        function=_here("provider", "run"),
    ),
    _tests("cuda-layer", "device memory, recordings, threads, caption loop", 90, file=LAYER),
    Step(
        name="bundle-micro",
        title="bundle for parity: copied or exported",
        limit_s=180,
        min_s=2,
        needs=(GPU, *RUNTIME),
        function=_here("bundles", "run_micro"),
    ),
    _parity("fp32", "fp32"),
    _parity("fp16", "fp16"),
    _parity("int8", "int8"),
    _parity("tf32", "fp32", tf32=True),
    Step(
        name="bundle-tap_vit_b",
        title="bundle for latency: weights restored, or exported",
        limit_s=900,
        min_s=15,
        needs=(GPU, *RUNTIME),
        function=_here("bundles", "run_vit_b"),
    ),
    _latency("fp16", "fp16"),
    _torch("fp16", "fp16"),
    _tests("suite", "pytest -m gpu, the rest of it", 150, without=LAYER, after=("bundle-micro",)),
    _latency("tf32", "fp32", tf32=True),
    _latency("int8", "int8"),
    _latency("fp32", "fp32"),
    _torch("compiled", "compiled", limit_s=120),
    _torch("tf32", "tf32"),
    _torch("fp32", "fp32"),
    *map(_host, (1, 4, 16)),
    _engines("tensorrt"),
    _engines("tensorrt_rtx"),
)


def select(
    names: Sequence[str], against: Sequence[str] = (), steps: Sequence[Step] = STEPS
) -> list[Step]:
    """Return the selected steps and their prerequisites, in order.

    Args:
        names: names of steps or groups; empty for all steps without ``asked_for``.
        against: groups to add.
        steps: the steps to select from.

    Raises:
        ValueError: a name is neither a step nor a group.
    """
    known = {step.name for step in steps} | {step.group for step in steps}
    for name in (*names, *against):
        if name not in known:
            raise ValueError(
                f"there is no step {name!r}; expected some of "
                f"{', '.join(step.name for step in steps)}, or a group, the part before the dash"
            )
    wanted = {
        step.name
        for step in steps
        if {step.name, step.group} & {*names, *against} or not (names or step.asked_for)
    }
    for step in reversed(steps):  # prerequisites stand before their steps
        if step.name in wanted:
            wanted.update(step.after)
    return [step for step in steps if step.name in wanted]
