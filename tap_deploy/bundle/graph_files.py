"""ONNX models with their weights beside them: written, checked, and loaded wherever links lead."""

from __future__ import annotations

import collections
import os
import pathlib
from typing import TYPE_CHECKING

from tap_deploy.bundle.manifest import GraphRecord, weights_file
from tap_deploy.errors import BundleError
from tap_deploy.graphs import GraphSpec

if TYPE_CHECKING:
    import onnx_ir as ir

# Weights beyond this go to a file of their own. A protobuf ends at 2 GiB, and is parsed into memory
# as a whole, twice over while that lasts; a file beside it is mapped, and read where it is needed.
EXTERNAL_DATA_BYTES = 1_000_000_000


def load_graph(path: str | os.PathLike[str]) -> ir.Model:
    """Load a model; weights beside it are mapped, and read where they are needed.

    Files of a bundle may be links, hard or symbolic, to anywhere: whoever copies or caches bundles
    makes such, and the manifest vouches for what they lead to. onnx-ir by itself refuses them.

    Raises:
        BundleError: the weights lie elsewhere than in ``weights_file(path)``, the only place that
            a manifest can vouch for.
    """
    import onnx_ir as ir

    model = ir.load(path)
    data = pathlib.Path(weights_file(path))
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            if os.fspath(tensor.location) != data.name:
                raise BundleError(
                    f"graph {path} has weights in {os.fspath(tensor.location)!r}; expected "
                    f"{data.name!r} beside it; export the bundle again"
                )
            value.const_value = ir.ExternalTensor(
                data.resolve(),  # without a base folder, no link is followed any more, or refused
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
    """Write a model, with its weights in the same file or in one beside it.

    Args:
        model: in memory, or with mapped weights, which are read into it if one file takes all.
        path: the ONNX file; a second file is ``weights_file(path)``.
        beside: whether there is a second file; None for weights of more than 1 GB only.

    Returns:
        size of the weights in bytes, and whether they are in a second file.
    """
    import onnx_ir as ir

    weights_bytes = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    beside = weights_bytes > EXTERNAL_DATA_BYTES if beside is None else beside
    if not beside:  # mapped weights would refer to the file that they come from
        ir.external_data.load_to_model(model)
    ir.save(model, path, external_data=weights_file(path.name) if beside else None)
    return weights_bytes, beside


def save_graph(model: ir.Model, spec: GraphSpec, root: pathlib.Path, file: str) -> GraphRecord:
    """Infer shapes, write a model, check it, and return its record for the manifest.

    Args:
        model: in memory.
        spec: names, dtypes and axes of its inputs and outputs.
        root: folder that ``file`` is relative to.
        file: ``/`` between its parts; weights over 1 GB go to ``weights_file(file)``.
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
