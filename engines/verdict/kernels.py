"""Kernels that really run, as the backends tell: from optimised graphs or an inspector."""

from __future__ import annotations

import collections
import dataclasses
import os

import onnx

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.plans import all_records
from tap_deploy.errors import SessionError, first_line
from tap_deploy.sessions.openvino.session import executed_layers
from tap_deploy.sessions.ort.session import (
    import_onnxruntime,
    linked_weights,
    session_options,
)
from tap_deploy.storage.unfinished import temporary_folder

# Operators that onnxruntime's fusions create for matrix products of quantized values.
_INTEGER_PRODUCTS = {
    "ConvInteger",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QAttention",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
}
_FLOAT_PRODUCTS = {
    "Attention",
    "Conv",
    "ConvTranspose",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "Gemm",
    "MatMul",
    "MultiHeadAttention",
    "NhwcFusedConv",
}


# Layers of OpenVINO that multiply matrices, and the precisions that it names.
_OPENVINO_PRODUCTS = {"Convolution", "Deconvolution", "FullyConnected", "MatMul"}
_OPENVINO_PRECISIONS = {"i8": "int8", "u8": "int8", "f32": "fp32"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCount:
    """Matrix products and convolutions of a graph as executed.

    Attributes:
        integer: number of products with integer kernels.
        float_weights: number of float products with constant weights.
        float_activations: number of float products of two activations, as in attention.
        quantize: number of remaining QuantizeLinear nodes.
        dequantize: number of remaining DequantizeLinear nodes; one before a float product means
            that the product does not run in int8.
        op_types: operator -> number of nodes in the optimised graph.
    """

    integer: int
    float_weights: int
    float_activations: int
    quantize: int
    dequantize: int
    op_types: dict[str, int]

    @property
    def summary(self) -> str:
        """One line for the report."""
        total = self.integer + self.float_weights + self.float_activations
        return f"{self.integer} of {total} products use integer kernels"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCount:
    """Layers of an engine according to its inspector, or matrix products in OpenVINO.

    Attributes:
        precisions: precision -> number of layers; of engines, see ``precisions_from_json``.
    """

    precisions: dict[str, int]

    @property
    def summary(self) -> str:
        """One line for the report."""
        total = sum(self.precisions.values())
        return f"{self.precisions.get('int8', 0)} of {total} layers compute in int8"


def layers_in_engine(bundle: Bundle, backend: str, variant: str, graph: str) -> LayerCount | None:
    """Return the layer counts of a built engine; None if no GPU has inspected it."""
    wanted = (backend, variant, graph)
    for _, record in all_records(bundle):
        if (record.backend, record.variant, record.graph) != wanted:
            continue
        if record.layer_precisions is not None:
            return LayerCount(precisions=dict(record.layer_precisions))
    return None


def layers_in_openvino(path: str | os.PathLike[str]) -> LayerCount:
    """Compile a graph with OpenVINO for this CPU, and count its products by their precision.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        SessionError: OpenVINO cannot load the graph.
    """
    found = (
        _OPENVINO_PRECISIONS.get(precision, precision)
        for kind, precision in executed_layers(path)
        if kind in _OPENVINO_PRODUCTS
    )
    return LayerCount(precisions=dict(sorted(collections.Counter(found).items())))


def kernels_in_onnxruntime(path: str | os.PathLike[str]) -> KernelCount:
    """Optimise a graph with onnxruntime for this CPU, and count its kernels.

    Raises:
        SessionError: onnxruntime cannot load the graph.
    """
    with temporary_folder() as folder:
        optimised = folder / "optimised.onnx"
        onnxruntime = import_onnxruntime()
        options = session_options(onnxruntime)
        options.optimized_model_filepath = os.fspath(optimised)
        # Keep weights in a separate file: they may exceed a protobuf's limit and are not read.
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "weights.bin"
        )
        try:
            with linked_weights(options, path):
                onnxruntime.InferenceSession(
                    os.fspath(path), options, providers=["CPUExecutionProvider"]
                )
        except Exception as exc:  # onnxruntime has one class per status code, no common base
            raise SessionError(f"onnxruntime cannot load {path}: {first_line(exc)}") from exc
        return count_kernels(onnx.load(optimised, load_external_data=False))


def count_kernels(model: onnx.ModelProto) -> KernelCount:
    """Count the matrix products and convolutions of an optimised graph."""
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {n.output[0] for n in model.graph.node if n.op_type == "Constant"}
    dequantized = {  # weights that a DequantizeLinear converts back to float
        node.output[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
    }
    ops = collections.Counter(node.op_type for node in model.graph.node)
    weighted = sum(
        node.op_type in _FLOAT_PRODUCTS and bool({*node.input[:2]} & (constants | dequantized))
        for node in model.graph.node
    )
    return KernelCount(
        integer=sum(ops[name] for name in _INTEGER_PRODUCTS),
        float_weights=weighted,
        float_activations=sum(ops[name] for name in _FLOAT_PRODUCTS) - weighted,
        quantize=ops["QuantizeLinear"],
        dequantize=ops["DequantizeLinear"],
        op_types=dict(sorted(ops.items())),
    )
