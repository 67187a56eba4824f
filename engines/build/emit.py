"""Command lines of NVIDIA's tools that reproduce the builds.

The tools write the plans to the working directory. Those have no sidecar, so ``tap_deploy`` does
not load them.
"""

from __future__ import annotations

import pathlib
import shlex

from tap_deploy.engines.build.bundle_build import GraphBuild
from tap_deploy.engines.build.profiles import Profile
from tap_deploy.engines.build.target import AMPERE_PLUS, CURRENT, BuildTarget

TRTEXEC, POLYGRAPHY = "trtexec", "polygraphy"
TOOLS = (TRTEXEC, POLYGRAPHY)
_BOUNDS = ("min", "opt", "max")
MIB = 1 << 20


def tool_command(tool: str, build: GraphBuild, target: BuildTarget) -> str:
    """Return a shell command that builds one graph as ``build_engines`` does.

    Args:
        tool: one of ``TOOLS``; for TensorRT-RTX, NVIDIA's trtexec is called ``tensorrt_rtx``.
        build: the graph and its profile.
        target: backend and settings.
    """
    output = pathlib.Path(f"{build.graph}.plan")
    if tool == POLYGRAPHY:
        return _joined(_polygraphy(build, output, target))
    words = _rtx_tool(build, output, target) if target.is_rtx else _trtexec(build, output, target)
    return _joined(words)


def _trtexec(build: GraphBuild, output: pathlib.Path, target: BuildTarget) -> list[str]:
    # On 11.x, --stronglyTyped is accepted and has no effect: networks are always strongly typed.
    words = ["trtexec", f"--onnx={build.onnx_path}", f"--saveEngine={output}", "--stronglyTyped"]
    words += _trtexec_shapes(build)
    words.append(f"--memPoolSize=workspace:{target.workspace_bytes / MIB:g}M")
    words.append(f"--builderOptimizationLevel={target.opt_level}")
    words.append("--profilingVerbosity=detailed")
    if not target.tf32:
        words.append("--noTF32")
    if target.timing_cache is not None:
        words.append(f"--timingCacheFile={target.timing_cache}")
    if target.version_compatible:
        words.append("--versionCompatible")
    if target.hardware_compatible is not None:
        same = "sameComputeCapability"
        level = AMPERE_PLUS if target.hardware_compatible == AMPERE_PLUS else same
        words.append(f"--hardwareCompatibilityLevel={level}")
    return [*words, "--skipInference"]


def _rtx_tool(build: GraphBuild, output: pathlib.Path, target: BuildTarget) -> list[str]:
    """Return the command for TensorRT-RTX's tool, whose networks are always strongly typed."""
    words = ["tensorrt_rtx", f"--onnx={build.onnx_path}", f"--saveEngine={output}"]
    words += _trtexec_shapes(build)
    if target.compute_capabilities == (CURRENT,):
        words.append("--useGpu")
    elif target.compute_capabilities:
        names = (c.replace(".", "") for c in target.compute_capabilities)
        words.append(f"--computeCapabilities={','.join(names)}")
    return [*words, "--skipInference"]


def _polygraphy(build: GraphBuild, output: pathlib.Path, target: BuildTarget) -> list[str]:
    words = ["env", "POLYGRAPHY_USE_TENSORRT_RTX=1"] if target.is_rtx else []
    if target.is_rtx and not target.tf32:
        words.append("NVIDIA_TF32_OVERRIDE=0")  # Polygraphy leaves TF32 on for RTX
    words += ["polygraphy", "convert", str(build.onnx_path), "--convert-to", "trt"]
    words += ["--output", str(output), "--strongly-typed"]
    for bound in _BOUNDS:
        words.append(f"--trt-{bound}-shapes")
        words += [
            f"{name}:[{','.join(map(str, getattr(shapes, bound)))}]"
            for name, shapes in _dynamic(build).items()
        ]
    words += ["--pool-limit", f"workspace:{target.workspace_bytes}"]
    words += ["--builder-optimization-level", str(target.opt_level)]
    if target.tf32:
        words.append("--tf32")
    if target.compute_capabilities == (CURRENT,):
        words.append("--use-gpu")
    elif target.compute_capabilities:
        words += ["--compute-capabilities", *target.compute_capabilities]
    if target.timing_cache is not None:
        cache = str(target.timing_cache)
        words += ["--load-timing-cache", cache, "--save-timing-cache", cache]
    if target.version_compatible:
        words.append("--version-compatible")
    if target.hardware_compatible is not None:
        same = "same_compute_capability"
        level = "ampere_plus" if target.hardware_compatible == AMPERE_PLUS else same
        words += ["--hardware-compatibility-level", level]
    return words


def _trtexec_shapes(build: GraphBuild) -> list[str]:
    return [
        f"--{bound}Shapes="
        + ",".join(
            f"{name}:{'x'.join(map(str, getattr(shapes, bound)))}"
            for name, shapes in _dynamic(build).items()
        )
        for bound in _BOUNDS
    ]


def _dynamic(build: GraphBuild) -> Profile:
    """Return the profile without inputs of fixed shape, for which the tools reject shapes."""
    fixed = {tensor.name for tensor in build.spec.inputs if not tensor.dynamic_axes}
    return {name: shapes for name, shapes in build.profile.items() if name not in fixed}


def _joined(words: list[str]) -> str:
    """Return a shell command with one option and its values per line."""
    lines: list[str] = []
    for word in words:
        if word.startswith("--") or not lines:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n    ".join(lines)
