"""ONNX to TensorRT-RTX: the NVIDIA builder that compiles on machines without a GPU."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from tap_deploy.errors import MissingDependencyError, SessionError
from tap_deploy.graphs import GraphSpec, TensorSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisRange:
    """Smallest, usual and largest size of a dynamic axis: one optimization profile's view."""

    min: int
    opt: int
    max: int


# T begins at 1: no NVIDIA runtime binds a tensor of length 0, so position 0 reads a masked slot.
DEFAULT_RANGES = {
    "B": AxisRange(min=1, opt=1, max=1),
    "P": AxisRange(min=1, opt=8, max=64),
    "N": AxisRange(min=1, opt=2, max=16),
    "T": AxisRange(min=1, opt=20, max=40),
}


def rtx_engine_from_onnx(
    path: str | os.PathLike[str],
    spec: GraphSpec,
    *,
    compute_capability: str = "SM86",
    ranges: dict[str, AxisRange] | None = None,
) -> bytes:
    """Compile a graph with TensorRT-RTX, strongly typed; no GPU and no driver is needed.

    Args:
        path: the ONNX file.
        spec: what the graph takes and gives.
        compute_capability: name of the target in ``tensorrt_rtx.ComputeCapability``.
        ranges: sizes of the dynamic axes, by name; ``DEFAULT_RANGES`` if None.

    Returns:
        the serialized engine, for this version of TensorRT-RTX only.

    Raises:
        MissingDependencyError: tensorrt-rtx is not installed.
        SessionError: the parser or the builder refuses the graph; the message has its reason.
    """
    trt = _import_tensorrt_rtx()
    logger = _collecting_logger(trt)
    builder = trt.Builder(logger)
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = trt.OnnxParser(network, logger)
    # A file that is no protobuf at all parses "well", to a network of nothing.
    if not parser.parse_from_file(os.fspath(path)) or not network.num_outputs:
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        reason = "; ".join(reasons) or "it is not an ONNX model"
        raise SessionError(f"TensorRT-RTX cannot parse {path}: {reason}")
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, spec, ranges or DEFAULT_RANGES))
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, compute_capability), 0)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise SessionError(f"TensorRT-RTX cannot build {path}: {'; '.join(logger.errors)}")
    return bytes(engine)


def _profile(builder: Any, spec: GraphSpec, ranges: dict[str, AxisRange]) -> Any:
    profile = builder.create_optimization_profile()
    for tensor in spec.inputs:
        shapes = (_shape(tensor, ranges, bound) for bound in ("min", "opt", "max"))
        profile.set_shape(tensor.name, *shapes)
    return profile


def _shape(tensor: TensorSpec, ranges: dict[str, AxisRange], bound: str) -> list[int]:
    return [
        getattr(ranges[axis], bound) if isinstance(axis, str) else axis for axis in tensor.shape
    ]


def _import_tensorrt_rtx() -> Any:
    try:
        import tensorrt_rtx
    except ImportError as exc:
        raise MissingDependencyError(
            'TensorRT-RTX is not installed; install it with: pip install "tap-deploy[rtx]"'
        ) from exc
    return tensorrt_rtx


def _collecting_logger(trt: Any) -> Any:
    class CollectingLogger(trt.ILogger):  # type: ignore[misc]
        """Keeps errors, so that they can be part of ours; the rest is noise."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    return CollectingLogger()
