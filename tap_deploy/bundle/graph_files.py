"""Reading, writing and checking of ONNX models with external weights."""

from __future__ import annotations

import collections
import os
import pathlib
from typing import TYPE_CHECKING

from tap_deploy.bundle.graph_references import require_listed_data
from tap_deploy.bundle.manifest import GraphRecord, weights_file
from tap_deploy.graphs import GraphSpec

if TYPE_CHECKING:
    import onnx_ir as ir

# Larger weights go to an external file: a protobuf is limited to 2 GiB and is parsed into memory
# as a whole, with two copies while parsing; an external file is memory-mapped.
EXTERNAL_DATA_BYTES = 1_000_000_000


def load_graph(path: str | os.PathLike[str]) -> ir.Model:
    """Load a model; external weights are memory-mapped.

    Files of a bundle may be hard or symbolic links, as caches and copy tools create them. onnx-ir
    refuses links, but here the manifest has the SHA-256 of the files they point to.

    Raises:
        BundleError: the graph cannot be read, or has data in another file than
            ``weights_file(path)``, the only one that the manifest covers.
    """
    import onnx_ir as ir

    data = pathlib.Path(weights_file(path))
    require_listed_data(path, (data.name,))
    model = ir.load(path)
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            value.const_value = ir.ExternalTensor(
                data.resolve(),  # resolved and without a base folder, onnx-ir finds no link
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
            )
    return model


def write_model(
    model: ir.Model, path: pathlib.Path, *, beside: bool | None = None
) -> tuple[int, bool]:
    """Write a model with its weights inside the ONNX file or in an external file.

    Args:
        model: the model; mapped weights are loaded into memory if they go inside the ONNX file.
        path: the ONNX file; the external file is ``weights_file(path)``.
        beside: whether weights go to the external file; None: only if they exceed 1 GB.

    Returns:
        Size of the weights in bytes, and whether they are in the external file.
    """
    import onnx_ir as ir

    weights_bytes = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    beside = weights_bytes > EXTERNAL_DATA_BYTES if beside is None else beside
    if not beside:  # otherwise the new file would refer to the weights file of the old one
        ir.external_data.load_to_model(model)
    ir.save(model, path, external_data=weights_file(path.name) if beside else None)
    return weights_bytes, beside


def save_graph(model: ir.Model, spec: GraphSpec, root: pathlib.Path, file: str) -> GraphRecord:
    """Infer shapes, write a model, check it, and return its record for the manifest.

    Args:
        model: the model; shape inference changes it in place.
        spec: names, dtypes and axes of its inputs and outputs.
        root: folder that ``file`` is relative to.
        file: relative path with ``/`` as separator; weights over 1 GB go to
            ``weights_file(file)``.
    """
    import onnx
    from onnx_ir.passes.common import ShapeInferencePass

    ShapeInferencePass(check_type=True, strict_mode=True)(model)
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    weights_bytes, external = write_model(model, path)
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
