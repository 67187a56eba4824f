"""One PyTorch module to one ONNX file."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import pathlib
import warnings
from collections.abc import Iterator

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ShapeInferencePass
from torch import nn

from tap_deploy.export.cleanup import clean_up
from tap_deploy.graphs import GraphSpec, TensorSpec
from tap_deploy.manifest import GraphRecord

OPSET = 20  # the newest that TensorRT 10.3 takes; Gelu is one op from here on
IR_VERSION = 10
# A protobuf ends at 2 GiB; weights beyond this go to a file of their own.
EXTERNAL_DATA_BYTES = 1_800_000_000

# Any sizes but 0 and 1, which the tracer would take for constants; all different.
EXAMPLE_SIZES = {"B": 2, "P": 3, "N": 5, "T": 7}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportedGraph:
    """A written ONNX file and its record for the manifest."""

    path: pathlib.Path
    record: GraphRecord


def export_graph(module: nn.Module, spec: GraphSpec, path: pathlib.Path) -> ExportedGraph:
    """Export a module as an ONNX file.

    Args:
        module: takes and gives the tensors of ``spec``, in order.
        spec: names, dtypes and axes.
        path: the file to write; weights over 1.8 GB go to ``<path>.data`` beside it.

    The file is checked by ``onnx.checker`` and by shape inference before this returns.
    """
    model = onnx_from_module(module, spec)
    clean_up(model, spec)
    ShapeInferencePass(check_type=True, strict_mode=True)(model)
    weights_bytes = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    external = weights_bytes > EXTERNAL_DATA_BYTES
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path, external_data=f"{path.name}.data" if external else None)
    onnx.checker.check_model(os.fspath(path))
    inputs, outputs = GraphRecord.describe(spec)
    record = GraphRecord(
        file=path.name,
        inputs=inputs,
        outputs=outputs,
        opset=model.opset_imports[""],
        ir_version=model.ir_version,
        num_nodes=len(model.graph),
        op_types=dict(sorted(collections.Counter(n.op_type for n in model.graph).items())),
        weights_bytes=weights_bytes,
        external_data=external,
    )
    return ExportedGraph(path=path, record=record)


def onnx_from_module(module: nn.Module, spec: GraphSpec) -> ir.Model:
    """Trace a module into an ONNX model in memory."""
    dynamic_shapes = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis in tensor.dynamic_axes} or None
        for tensor in spec.inputs
    )
    with _quiet_exporter(), torch.inference_mode(False), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            tuple(_example(tensor) for tensor in spec.inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes=dynamic_shapes,
            optimize=True,
            verbose=False,
        )
    if program is None:
        raise RuntimeError(f"the exporter returned no program for {spec.name}")
    program.model.ir_version = min(program.model.ir_version, IR_VERSION)
    return program.model


def _example(tensor: TensorSpec) -> torch.Tensor:
    shape = [EXAMPLE_SIZES[axis] if isinstance(axis, str) else axis for axis in tensor.shape]
    return torch.zeros(shape, dtype=getattr(torch, tensor.dtype))


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says about itself: operators of torchvision, deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
