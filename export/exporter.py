"""Exports one PyTorch module as one ONNX file."""

from __future__ import annotations

import contextlib
import inspect
import logging
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from tap_deploy.bundle.graph_config import write_config
from tap_deploy.bundle.graph_files import save_graph
from tap_deploy.bundle.manifest import GraphRecord
from tap_deploy.config import TapConfig
from tap_deploy.export.cleanup import clean_up
from tap_deploy.graphs import GraphSpec, TensorSpec

OPSET = 20  # the newest that TensorRT 10.3 supports, and the first with a Gelu op
IR_VERSION = 10

# Example sizes of dynamic axes: all different, and not 0 or 1, which the tracer specialises.
EXAMPLE_SIZES = {"B": 2, "P": 3, "N": 5, "M": 4, "Q": 8, "T": 7, "K": 6}


def export_graph(
    module: nn.Module, spec: GraphSpec, config: TapConfig, root: pathlib.Path, file: str
) -> GraphRecord:
    """Export a module as an ONNX file, validate it, and return its record.

    The file is validated with ``onnx.checker`` and shape inference.

    Args:
        module: its inputs and outputs are the tensors of ``spec``, in order.
        spec: names, dtypes and axes.
        config: sizes of the model, which the file keeps.
        root: folder that ``file`` is relative to.
        file: the file to write; see ``save_graph``.
    """
    model = onnx_from_module(module, spec)
    clean_up(model, spec)
    write_config(model, config)
    return save_graph(model, spec, root, file)


def onnx_from_module(module: nn.Module, spec: GraphSpec) -> ir.Model:
    """Trace a module into an ONNX model in memory."""
    with _quiet_exporter(), torch.inference_mode(False), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            tuple(_example(tensor) for tensor in spec.inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes=_dynamic_shapes(module, spec),
            optimize=True,
            verbose=False,
        )
    if program is None:
        raise RuntimeError(f"the exporter returned no program for {spec.name}")
    program.model.ir_version = min(program.model.ir_version, IR_VERSION)
    return program.model


def _dynamic_shapes(module: nn.Module, spec: GraphSpec) -> tuple[Any, ...]:
    """Return the dynamic axes of each argument; those of ``*past`` form one tuple."""
    shapes = [{axis: torch.export.Dim.DYNAMIC for axis in t.dynamic_axes} for t in spec.inputs]
    parameters = inspect.signature(module.forward).parameters.values()
    named = sum(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters)
    rest = shapes[named:]
    return (*shapes[:named], tuple(rest)) if rest else tuple(shapes)


def _example(tensor: TensorSpec) -> torch.Tensor:
    shape = [EXAMPLE_SIZES[axis] if isinstance(axis, str) else axis for axis in tensor.shape]
    return torch.zeros(shape, dtype=getattr(torch, tensor.dtype))


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's own warnings: missing torchvision operators, deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
