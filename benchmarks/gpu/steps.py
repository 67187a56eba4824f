"""The steps, in the order of what they are worth when time is short."""

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
    """One process.

    Attributes:
        name: its group is what stands before the first dash.
        title: what it answers.
        limit_s: it is killed after so many seconds.
        min_s: with fewer seconds left it is not begun.
        needs: see ``machine.missing``.
        after: steps whose results it uses; they are run first.
        function: ``module:function``, called with ``Context``, ``Notes`` and ``options``.
        options: further arguments.
        environment: variables of its process.
        asked_for: only run by name or by ``--against``.
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
        """Name under which it is asked for together with others."""
        return self.name.split("-")[0]

    @property
    def uses_gpu(self) -> bool:
        """Whether it shows something about a GPU; that there are bundles does not."""
        return GPU in self.needs and self.group != "bundle"

    def call(self, context: Context, notes: Notes) -> None:
        """Do it, in this process."""
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
        title=f"the host's work for 47 regions at 1920x1080, threads of NumPy: {threads}",
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
        title="what is installed, and how the GPU stands",
        limit_s=30,
        min_s=2,
        needs=("numpy",),
        function=_here("versions", "run"),
    ),
    Step(
        name="ceilings",
        title="what copies and products reach here at best",
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
    _tests("memory", "device memory: copies, recording, threads", 45, file=LAYER, k="memory"),
    _tests("captioner", "the caption loop over a kernel", 60, file=LAYER, k="captioner"),
    Step(
        name="bundle-micro",
        title="the bundle for parity: unpacked, or made here",
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
        title="the bundle for latency: weights filled in, or made here",
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
    """Return steps in order, with those that they come after.

    Args:
        names: of steps or groups; none for all that need not be asked for.
        against: groups that are run besides.
        steps: to choose from.

    Raises:
        ValueError: there is no such step.
    """
    known = {step.name for step in steps} | {step.group for step in steps}
    for name in (*names, *against):
        if name not in known:
            raise ValueError(
                f"there is no step {name!r}; expected some of "
                f"{', '.join(step.name for step in steps)}, or the part before a dash"
            )
    wanted = {
        step.name
        for step in steps
        if {step.name, step.group} & {*names, *against} or not (names or step.asked_for)
    }
    for step in reversed(steps):  # what a step comes after stands before it
        if step.name in wanted:
            wanted.update(step.after)
    return [step for step in steps if step.name in wanted]
