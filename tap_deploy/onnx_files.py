"""Writing ONNX models: checked, with their weights beside them where they must be."""

from __future__ import annotations

import collections
import os
import pathlib
from typing import TYPE_CHECKING

from tap_deploy.graphs import GraphSpec
from tap_deploy.manifest import GraphRecord

if TYPE_CHECKING:
    import onnx_ir as ir

# Weights beyond this go to a file of their own. A protobuf ends at 2 GiB, and is parsed into memory
# as a whole, twice over while that lasts; a file beside it is mapped, and read where it is needed.
EXTERNAL_DATA_BYTES = 1_000_000_000


def save_graph(model: ir.Model, spec: GraphSpec, root: pathlib.Path, file: str) -> GraphRecord:
    """Infer shapes, write a model, check it, and return its record for the manifest.

    Args:
        model: in memory.
        spec: names, dtypes and axes of its inputs and outputs.
        root: folder that ``file`` is relative to.
        file: ``/`` between its parts; weights over 1 GB go to ``<file>.data`` beside it.
    """
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes.common import ShapeInferencePass

    ShapeInferencePass(check_type=True, strict_mode=True)(model)
    weights_bytes = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    external = weights_bytes > EXTERNAL_DATA_BYTES
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if not external:  # what is left of a graph that was larger would refer to its file
        ir.external_data.load_to_model(model)
    ir.save(model, path, external_data=f"{path.name}.data" if external else None)
    onnx.checker.check_model(os.fspath(path))
    inputs, outputs = GraphRecord.describe(spec)
    return GraphRecord(
        file=file,
        inputs=inputs,
        outputs=outputs,
        opset=model.opset_imports[""],
        ir_version=int(model.ir_version or 0),
        num_nodes=len(model.graph),
        op_types=dict(sorted(collections.Counter(n.op_type for n in model.graph).items())),
        weights_bytes=weights_bytes,
        external_data=external,
    )
