"""Packages that the project can use, with minimum versions and the uses that need them.

A test compares the minimum versions with setup.cfg.
"""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.metadata
import importlib.util
import re

USES = ("run", "serve", "export", "quantize", "tensorrt", "rtx")
EVERY_USE = ", ".join(USES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Package:
    """An importable package.

    Attributes:
        name: distribution name.
        minimum: oldest version that works.
        required_for: uses, comma-separated.
        module: name of the module; None if it is ``name``.
        other_names: other distributions of the same module.
        extra: extra of tap-deploy that requires it; None if the base install does.
    """

    name: str
    minimum: str
    required_for: str
    module: str | None = None
    other_names: tuple[str, ...] = ()
    extra: str | None = None

    @property
    def install_command(self) -> str:
        """Shell command that installs or updates it."""
        return f'pip install "tap-deploy[{self.extra}]"' if self.extra else "pip install tap-deploy"

    def installed_version(self) -> str | None:
        """Return its version; "" if it is importable but has no metadata, None if absent."""
        if self._spec() is None:
            return None
        for name in (self.name, *self.other_names):
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return ""

    def leftover(self) -> str | None:
        """Return the folder that Python imports as an empty namespace package; None if none.

        pip leaves one if a package is uninstalled that shared its folder with another.
        """
        spec = self._spec()
        if spec is None or spec.origin is not None:
            return None
        return next(iter(spec.submodule_search_locations or ()), None)

    def _spec(self) -> importlib.machinery.ModuleSpec | None:
        try:
            return importlib.util.find_spec(self.module or self.name)
        except ModuleNotFoundError:  # the parent of a dotted name
            return None

    def problem_with(self, version: str | None) -> str | None:
        """Return the problem with an ``installed_version``; None if there is none."""
        if version is None:
            return "not installed"
        if version and release_of(version) < release_of(self.minimum):
            return f"{version} is too old; expected {self.minimum} or newer"
        return None


def release_of(version: str) -> tuple[int, ...]:
    """Return the release numbers of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()


ONNXRUNTIME = Package(
    name="onnxruntime",
    minimum="1.20",
    extra="onnxruntime",
    required_for="run, serve, export, quantize",
)
OPENVINO = Package(name="openvino", minimum="2026.0", extra="openvino", required_for="openvino")
TENSORRT = Package(
    name="tensorrt",
    other_names=("tensorrt-cu12", "tensorrt-cu13"),
    minimum="10.3",
    extra="tensorrt",
    required_for="tensorrt",
)
PACKAGES = (
    Package(name="numpy", minimum="1.26", required_for=EVERY_USE),
    Package(name="Pillow", module="PIL", minimum="10.1", required_for=EVERY_USE),
    Package(name="click", minimum="8.1", required_for=EVERY_USE),
    Package(name="sentencepiece", minimum="0.2", required_for=EVERY_USE),
    ONNXRUNTIME,
    OPENVINO,
    Package(name="torch", minimum="2.9", extra="export", required_for="export"),
    # The quantize extra has them without PyTorch; the export extra has them as well.
    Package(name="onnx", minimum="1.17", extra="quantize", required_for="export, quantize"),
    Package(name="onnxscript", minimum="0.5", extra="quantize", required_for="export, quantize"),
    Package(
        name="onnx-ir",
        module="onnx_ir",
        minimum="1.1",
        extra="quantize",
        required_for="export, quantize",
    ),
    Package(
        name="Jinja2",
        module="jinja2",
        minimum="3.1",
        extra="quantize",
        required_for="export, quantize, report",
    ),
    Package(name="safetensors", minimum="0.4", extra="export", required_for="export"),
    Package(name="pycocotools", minimum="2.0.8", extra="coco", required_for="coco"),
    Package(name="huggingface_hub", minimum="2.0", extra="hub", required_for="hub"),
    Package(name="rasterio", minimum="1.4", extra="raster", required_for="raster"),
    Package(name="fastapi", minimum="0.120", extra="serve", required_for="serve"),
    Package(name="uvicorn", minimum="0.35", extra="serve", required_for="serve"),
    Package(
        name="prometheus-client",
        module="prometheus_client",
        minimum="0.20",
        extra="serve",
        required_for="serve",
    ),
    Package(
        name="python-multipart",
        module="python_multipart",
        minimum="0.0.20",
        extra="serve",
        required_for="serve",
    ),
    Package(name="shapely", minimum="2.1", extra="serve", required_for="serve"),
    TENSORRT,
    Package(
        name="tensorrt-rtx", module="tensorrt_rtx", minimum="1.7", extra="rtx", required_for="rtx"
    ),
)
# Either one suffices. pycuda has no extra: it is compiled against the CUDA toolkit of the machine.
CUDA_PYTHON = Package(
    name="cuda-python",
    module="cuda.bindings",
    other_names=("cuda-bindings",),
    minimum="12.6",
    extra="cuda",
    required_for="tensorrt, rtx",
)
PYCUDA = Package(name="pycuda", minimum="2022.1", required_for="tensorrt, rtx")
