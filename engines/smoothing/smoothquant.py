"""SmoothQuant: moves outlier channels from activations into weights, which int8 represents better.

Gain and bias of a LayerNormalization are divided by a factor per channel, and the weights that read
its output are multiplied by it. The graph computes the same function up to rounding; only the
ranges of its tensors change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from tap_deploy.bundle.precision_record import SmoothingChoice
from tap_deploy.errors import InputError

DEFAULT_ALPHA = 0.5
# Smallest relative reduction of the error that counts; less may be sampling noise.
MIN_GAIN = 0.05
_LARGEST_FACTOR = 256.0  # keeps gains that are stored in fp16 normal numbers
_INT8_MAX = 127.0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SmoothingPoint:
    """A LayerNormalization whose output is read only by matrix products with constant weights.

    Attributes:
        norm: the LayerNormalization node.
        products: MatMul and Gemm nodes that read its output.
    """

    norm: ir.Node
    products: tuple[ir.Node, ...]

    @property
    def tensor(self) -> str:
        """Name of the norm's output."""
        return str(self.norm.outputs[0].name)

    def weights(self) -> np.ndarray:
        """Return the concatenated weights of all products, float32 ``[C, outputs]``."""
        return np.concatenate([_weight(node) for node in self.products], axis=1)

    def smoothing(self, factors: np.ndarray) -> Smoothing:
        """Return the smoothing of this point with the given factors."""
        return Smoothing(
            norm=str(self.norm.name),
            products=tuple(str(node.name) for node in self.products),
            factors=factors,
        )


def smoothing_points(model: ir.Model) -> list[SmoothingPoint]:
    """Return the points where a graph can be smoothed without new nodes."""
    points = []
    for node in model.graph:
        if node.op_type != "LayerNormalization" or len(node.inputs) != 3:
            continue
        output = node.outputs[0]
        users = tuple(use.node for use in output.uses())
        private = all(_is_private(value, node) for value in node.inputs[1:])
        if private and not output.is_graph_output() and _all_smoothable(users, output):
            points.append(SmoothingPoint(norm=node, products=users))
    return points


def smoothing_factors(
    point: SmoothingPoint, channel_maxima: np.ndarray, alpha: float = DEFAULT_ALPHA
) -> np.ndarray:
    """Return the divisor of each channel, float32 [C]; 1 for a channel that is always zero.

    Args:
        point: smoothing point.
        channel_maxima: largest magnitude of each channel of the norm's output, float [C].
        alpha: migration strength, 0..1: share of the range that moves into the weights.

    Raises:
        InputError: alpha is out of range, or the maxima are not finite or not one per channel.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"SmoothQuant alpha is {alpha}; expected 0 to 1")
    weights = np.abs(point.weights()).max(axis=1).astype(np.float64)  # [C]
    maxima = np.asarray(channel_maxima, np.float64)
    if maxima.shape != weights.shape or not np.isfinite(maxima).all():
        raise InputError(
            f"channel maxima of {point.tensor} are {list(maxima.shape)} or not finite; expected "
            f"{list(weights.shape)} finite numbers"
        )
    usable = (maxima > 0) & (weights > 0)
    factors = np.ones(len(maxima), np.float32)
    if usable.any():
        wanted = maxima[usable] ** alpha / weights[usable] ** (1 - alpha)
        # A factor common to all channels has no effect; normalise by the median.
        wanted /= np.median(wanted)
        factors[usable] = wanted.clip(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
    return factors


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Smoothing:
    """A smoothing by node names, applicable to any graph derived from the measured one.

    Attributes:
        norm: name of the LayerNormalization.
        products: names of the MatMul and Gemm nodes that read its output.
        factors: divisor of each channel, float32 [C].
    """

    norm: str
    products: tuple[str, ...]
    factors: np.ndarray


def fold(model: ir.Model, smoothing: Smoothing) -> None:
    """Divide gain and bias of a norm, and multiply the weights that read it, in place.

    Args:
        model: the measured fp32 graph, or a typed fp16 graph derived from it.
        smoothing: smoothing to apply.

    Raises:
        InputError: the graph lacks a node, or a weight is not an initializer.
    """
    nodes = {str(node.name): node for node in model.graph}
    missing = [name for name in (smoothing.norm, *smoothing.products) if name not in nodes]
    if missing:
        raise InputError(f"graph {model.graph.name} has no node {missing[0]!r} to smooth")
    factors = smoothing.factors
    for value in nodes[smoothing.norm].inputs[1:]:
        _rescale(value, 1 / factors.astype(np.float64))
    for name in smoothing.products:
        node = nodes[name]
        _rescale(node.inputs[1], factors[None, :] if _is_transposed(node) else factors[:, None])


def quantization_error(
    rows: np.ndarray, weights: np.ndarray, channel_maxima: np.ndarray, factors: np.ndarray
) -> float:
    """Return the noise-to-signal energy ratio of int8 matrix products smoothed by ``factors``.

    Args:
        rows: activations that the maxima were not measured on, float [R, C].
        weights: float [C, outputs].
        channel_maxima: float [C]; the largest one after smoothing is the activation range.
        factors: divisor of each channel, float [C]; ones for no smoothing.
    """
    smoothed = weights * factors[:, None]
    activation_scale = max(float((channel_maxima / factors).max()), 1e-30) / _INT8_MAX
    weight_scales = np.maximum(np.abs(smoothed).max(axis=0), 1e-30) / _INT8_MAX  # per output
    product = _rounded(rows / factors, activation_scale) @ _rounded(smoothed, weight_scales)
    exact = rows @ weights
    energy = float((exact.astype(np.float64) ** 2).sum())
    noise = float(((product - exact).astype(np.float64) ** 2).sum())
    return noise / max(energy, 1e-30)


def choose_smoothings(
    model: ir.Model,
    channel_maxima: Mapping[str, np.ndarray],
    held_back_rows: Mapping[str, np.ndarray],
    *,
    always: bool = False,
) -> tuple[list[Smoothing], list[SmoothingChoice]]:
    """Choose the points where smoothing lowers the error of int8 matrix products.

    Args:
        model: an fp32 graph; not modified.
        channel_maxima: output of a norm -> maxima on calibration data, float [C].
        held_back_rows: output of a norm -> rows from other pictures, float [R, C].
        always: smooth all measured points regardless of the error.

    Returns:
        The smoothings, for ``fold``, and the decision for every measured point.
    """
    smoothings, choices = [], []
    for point in smoothing_points(model):
        if point.tensor not in channel_maxima:
            continue
        maxima, rows = channel_maxima[point.tensor], held_back_rows[point.tensor]
        factors, weights = smoothing_factors(point, maxima), point.weights()
        error = quantization_error(rows, weights, maxima, np.ones_like(factors))
        smoothed = quantization_error(rows, weights, maxima, factors)
        kept = always or smoothed < (1 - MIN_GAIN) * error
        if kept:
            smoothings.append(point.smoothing(factors))
        choices.append(
            SmoothingChoice(
                norm=str(point.norm.name), error=error, smoothed_error=smoothed, kept=kept
            )
        )
    return smoothings, choices


def _rounded(values: np.ndarray, scale: float | np.ndarray) -> np.ndarray:
    quantized: np.ndarray = np.clip(np.rint(values / scale), -_INT8_MAX - 1, _INT8_MAX) * scale
    return quantized


def _all_smoothable(nodes: tuple[ir.Node, ...], source: ir.Value) -> bool:
    return bool(nodes) and all(_is_smoothable(node, source) for node in nodes)


def _is_smoothable(node: ir.Node, source: ir.Value) -> bool:
    """Whether a node multiplies ``source`` by a constant matrix that no other node reads."""
    if node.op_type not in ("MatMul", "Gemm") or node.inputs[0] is not source:
        return False
    weight = node.inputs[1]
    if weight is None or weight is source or not _is_private(weight, node):
        return False
    plain = node.op_type == "MatMul" or not node.attributes.get_int("transA", 0)
    return plain and weight.const_value is not None and len(weight.const_value.shape) == 2


def _is_private(value: ir.Value | None, node: ir.Node) -> bool:
    """Whether a value is an initializer that only this node reads."""
    if value is None or not value.is_initializer() or value.is_graph_output():
        return False
    return all(use.node is node for use in value.uses())


def _is_transposed(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))


def _weight(node: ir.Node) -> np.ndarray:
    value = node.inputs[1]
    assert value is not None
    array = _array(value)
    return array.T if _is_transposed(node) else array


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    array: np.ndarray = value.const_value.numpy()
    return array


def _rescale(value: ir.Value | None, factors: np.ndarray) -> None:
    if value is None or value.const_value is None:
        raise InputError(f"weight {value} is not an initializer and cannot be smoothed")
    array = _array(value)
    scaled = (array.astype(np.float64) * factors).astype(array.dtype)
    value.const_value = ir.tensor(scaled, name=value.name)
