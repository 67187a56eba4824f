"""Operations of the nodes that multiply matrices; nothing else costs a GPU much arithmetic."""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from tap_deploy.errors import BundleError

PRODUCT_OPS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
# Between a stored weight and the product that reads it.
_WEIGHT_PATH_OPS = ("DequantizeLinear", "Cast", "Transpose", "Identity", "Reshape")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """One matrix product or convolution at fixed sizes.

    Attributes:
        node: name of the ONNX node.
        flops: two operations per multiplication.
        weight: name of the initializer it multiplies with, None if both sides are activations.
        is_quantized: whether both of its inputs come out of DequantizeLinear.
    """

    node: str
    flops: int
    weight: str | None
    is_quantized: bool


def elements(value: ir.Value) -> int:
    """Return the number of elements of a value.

    Raises:
        BundleError: its shape is not known in numbers.
    """
    shape = value.shape
    if shape is None or not all(isinstance(axis, int) for axis in shape):
        raise BundleError(
            f"ONNX graph: the shape of {value.name} is {shape}, not known in numbers; "
            "export the bundle again"
        )
    return math.prod(shape.numpy())


def product_of(node: ir.Node) -> Product:
    """Return the work of a node whose type is one of ``PRODUCT_OPS``.

    Raises:
        BundleError: a shape is not known in numbers.
    """
    left, right = _input(node, 0), _input(node, 1)
    weight = _initializer(right) or _initializer(left)
    return Product(
        node=node.name or "",
        flops=2 * _multiplications(node, left, right),
        weight=weight.name if weight is not None else None,
        is_quantized=all(_is_dequantized(value) for value in (left, right)),
    )


def _multiplications(node: ir.Node, left: ir.Value, right: ir.Value) -> int:
    kernel = elements(right) // _axis(right, 0)  # of a convolution: [out, in / groups, height, …]
    if node.op_type == "Conv":
        return elements(node.outputs[0]) * kernel
    if node.op_type == "ConvTranspose":
        return elements(left) * kernel
    transposed = node.attributes.get("transA")
    inner = 0 if transposed is not None and transposed.as_int() else -1
    return elements(node.outputs[0]) * _axis(left, inner)


def _axis(value: ir.Value, index: int) -> int:
    elements(value)  # or there is no such number
    assert value.shape is not None
    return int(value.shape.numpy()[index])


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise BundleError(f"ONNX graph: {node.name} has no input {index}; export the bundle again")
    return value


def _initializer(value: ir.Value) -> ir.Value | None:
    """Return the stored weight that a value is made from, if it is made from nothing else."""
    producer = value.producer()
    if producer is None:
        return value if value.is_initializer() else None
    if producer.op_type not in _WEIGHT_PATH_OPS:
        return None
    return _initializer(_input(producer, 0))


def _is_dequantized(value: ir.Value) -> bool:
    producer = value.producer()
    while producer is not None and producer.op_type in ("Transpose", "Reshape", "Identity"):
        producer = _input(producer, 0).producer()
    return producer is not None and producer.op_type == "DequantizeLinear"
