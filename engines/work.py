"""What one call of a graph takes, counted from its ONNX file at given sizes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import onnx_ir as ir
from onnxscript.optimizer import fold_constants

from tap_deploy.engines.activations import peak_elements, traffic_elements
from tap_deploy.engines.products import PRODUCT_OPS, Product, elements, product_of
from tap_deploy.errors import BundleError
from tap_deploy.graphs import GraphSpec
from tap_deploy.onnx_files import load_graph
from tap_deploy.sessions.contract import resolve_shape

MAX_SHAPE_ELEMENTS = 64  # no shape has as many axes
# What is left of a graph after fusion: element-wise operators join the products, and an
# attention, whose one Softmax stands for it, is one kernel.
_KERNEL_OPS = ("LayerNormalization", "Softmax", "TopK")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphWork:
    """One call of a graph at fixed sizes of its dynamic axes; elements know no precision.

    Attributes:
        graph: its name.
        sizes: the dynamic axes.
        products: its matrix products and convolutions.
        weight_elements: floats that are stored with the graph.
        product_weight_elements: those of them that products multiply with.
        read_weight_elements: those that a call reads; of a table, it reads only a few rows.
        traffic_elements: activations that a call reads and writes, if fused as usual.
        peak_elements: most activations that are alive at once.
        kernels: launches that are left after fusion.
    """

    graph: str
    sizes: dict[str, int]
    products: tuple[Product, ...]
    weight_elements: int
    product_weight_elements: int
    read_weight_elements: int
    traffic_elements: int
    peak_elements: int
    kernels: int

    @property
    def flops(self) -> int:
        """Operations of all products, two per multiplication."""
        return sum(product.flops for product in self.products)

    @property
    def weighted_flops(self) -> int:
        """Operations of the products with stored weights: what INT8 usually covers."""
        return sum(product.flops for product in self.products if product.weight is not None)

    @property
    def quantized_flops(self) -> int:
        """Operations of the products that have Q/DQ nodes before them."""
        return sum(product.flops for product in self.products if product.is_quantized)


def count_work(
    path: str | os.PathLike[str], spec: GraphSpec, sizes: Mapping[str, int]
) -> GraphWork:
    """Count the work of one call.

    Args:
        path: the ONNX file, of any precision.
        spec: what the graph takes.
        sizes: every dynamic axis of its inputs, by name.

    Raises:
        BundleError: the file cannot be read, or its shapes do not follow from its inputs.
    """
    graph = _graph_with_shapes(path, spec, sizes)
    products = tuple(product_of(node) for node in graph if node.op_type in PRODUCT_OPS)
    weights = {
        name: elements(value)
        for name, value in graph.initializers.items()
        if _is_weight(value) and name is not None
    }
    multiplied = {product.weight for product in products if product.weight is not None}
    tables = {name for name in weights if _is_table(graph.initializers[name])}
    return GraphWork(
        graph=spec.name,
        sizes=dict(sizes),
        products=products,
        weight_elements=sum(weights.values()),
        product_weight_elements=sum(weights.get(name, 0) for name in multiplied),
        read_weight_elements=sum(n for name, n in weights.items() if name not in tables),
        traffic_elements=traffic_elements(graph),
        peak_elements=peak_elements(graph),
        kernels=sum(_is_kernel(node) for node in graph),
    )


def _graph_with_shapes(
    path: str | os.PathLike[str], spec: GraphSpec, sizes: Mapping[str, int]
) -> ir.Graph:
    try:
        model = load_graph(path)
    # protobuf and onnx-ir raise classes of their own, with no common base.
    except Exception as exc:
        raise BundleError(f"{path} cannot be read as ONNX: {exc}; export it again") from exc
    shapes = {tensor.name: resolve_shape(tensor, dict(sizes)) for tensor in spec.inputs}
    for value in model.graph.inputs:
        if value.name not in shapes:
            raise BundleError(f"{path} has an input {value.name!r}; expected {sorted(shapes)}")
        value.shape = ir.Shape(shapes[value.name])
    for node in model.graph:  # what was inferred at export holds the names of the axes
        for output in node.outputs:
            output.shape = None
    # Shapes that are computed in the graph follow from its inputs; weights are left alone.
    fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=MAX_SHAPE_ELEMENTS,
        output_size_limit=MAX_SHAPE_ELEMENTS,
    )
    return model.graph


def _is_weight(value: ir.Value) -> bool:
    """Whether an initializer is part of the model, and not a shape or a scale."""
    tensor = value.const_value
    if tensor is None or tensor.size < 2:
        return False
    return tensor.dtype.is_floating_point() or tensor.dtype in (ir.DataType.INT8, ir.DataType.UINT8)


def _is_table(value: ir.Value) -> bool:
    """Whether an initializer is only ever looked up by index."""
    uses = value.uses()
    return bool(uses) and all(use.node.op_type == "Gather" and use.idx == 0 for use in uses)


def _is_kernel(node: ir.Node) -> bool:
    if node.op_type in _KERNEL_OPS:
        return True
    return node.op_type in PRODUCT_OPS and product_of(node).weight is not None
