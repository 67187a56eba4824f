"""Step: installed packages and state of the GPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.context import Context, Notes, one_line
from tap_deploy.machine.host import Host
from tap_deploy.machine.state import gpu_conditions, machine_state, state_as_dict
from tap_deploy.optional_modules import load_module
from tap_deploy.sessions.ort.session import import_onnxruntime

PACKAGES = re.compile(
    r"(numpy|torch|triton|cupy.*|cuda-.*|pycuda|onnx.*|tensorrt.*|nvidia-.*|pillow|sentencepiece"
    r"|pytest|polygraphy)",
    re.IGNORECASE,
)


def run(context: Context, notes: Notes) -> None:
    """Note versions, machine and clocks; note the error of a package that cannot be loaded."""
    notes.put("python", platform.python_version())
    notes.put("packages", _packages())
    notes.put("machine", state_as_dict(machine_state()))
    notes.put("gpu", gpu_conditions())
    notes.put("library_path", os.environ.get("LD_LIBRARY_PATH", ""))
    answer = Host().run(["nvidia-smi", "-q", "-d", "CLOCK,POWER,MEMORY,TEMPERATURE,ECC"])
    (context.logs / "nvidia-smi.txt").write_text(answer.output or str(answer.problem), "utf-8")
    title = notes.values["machine"]["title"]
    notes.put("headline", title)
    for name, ask in QUESTIONS.items():  # last: a broken library may kill the process
        notes.put(name, _answer(ask))
    providers = notes.values["onnxruntime"]
    notes.put("headline", f"{title}, onnxruntime {providers}")


def _packages() -> dict[str, str]:
    """Return the installed packages that results may depend on, name -> version."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = str(distribution.metadata["Name"])
        if PACKAGES.fullmatch(name):
            found.setdefault(name.lower(), distribution.version)
    return dict(sorted(found.items()))


def _answer(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as exc:  # packages raise anything if their libraries are missing
        return one_line(exc)


def _cuda() -> str:
    runtime = importlib.import_module("cuda.bindings.runtime")
    driver, version = runtime.cudaDriverGetVersion()[1], runtime.cudaRuntimeGetVersion()[1]
    return f"driver for CUDA {_dotted(driver)}, runtime {_dotted(version)}"


def _torch() -> str:
    torch = importlib.import_module("torch")
    return f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


def _cupy() -> str:
    cupy: Any = load_module("cupy")
    version = _dotted(cupy.cuda.runtime.runtimeGetVersion())
    return f"{cupy.__version__}, CUDA {version}"


def _onnxruntime() -> str:
    runtime = import_onnxruntime()
    return f"{runtime.__version__} with {', '.join(runtime.get_available_providers())}"


def _version(module: str) -> Callable[[], str]:
    return lambda: str(importlib.import_module(module).__version__)


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


QUESTIONS: dict[str, Callable[[], Any]] = {
    "cuda": _cuda,
    "onnxruntime": _onnxruntime,
    "cupy": _cupy,
    "torch": _torch,
    "tensorrt": _version("tensorrt"),
    "tensorrt_rtx": _version("tensorrt_rtx"),
}
