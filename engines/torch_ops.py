"""The operators of our graphs, one by one, on torch tensors that keep the dtypes of ONNX.

torch is handed in as a module: this file is imported on machines that do not have it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Tensor = Any
Attributes = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call of an operator: inputs (None where left out), attributes, number of outputs."""

    torch: Any
    inputs: Sequence[Tensor]
    attributes: Attributes
    num_outputs: int

    def ints(self, index: int) -> list[int]:
        """Return an input that holds whole numbers."""
        return [int(x) for x in self.inputs[index].flatten().tolist()]

    def ints_or(self, index: int, default: list[int]) -> list[int]:
        """Return an optional input that holds whole numbers."""
        given = index < len(self.inputs) and self.inputs[index] is not None
        return self.ints(index) if given else default

    def get(self, name: str, default: Any) -> Any:
        """Return an attribute."""
        return self.attributes.get(name, default)


def _rounded(call: Call, compute: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Compute a sum of products in fp32 and round it once, as tensor cores do.

    torch's own fp16 product on a CPU does the same, far slower.
    """
    dtype = next(t.dtype for t in tensors if t is not None)
    single = [None if t is None else t.to(call.torch.float32) for t in tensors]
    return compute(*single).to(dtype)


def _matmul(call: Call) -> Tensor:
    return _rounded(call, call.torch.matmul, *call.inputs)


def _gemm(call: Call) -> Tensor:
    def compute(a: Tensor, b: Tensor, c: Tensor = None) -> Tensor:
        a = a.T if call.get("transA", 0) else a
        b = b.T if call.get("transB", 0) else b
        product = call.get("alpha", 1.0) * (a @ b)
        return product if c is None else product + call.get("beta", 1.0) * c

    return _rounded(call, compute, *call.inputs)


def _conv(call: Call) -> Tensor:
    rank = call.inputs[0].dim() - 2
    pads = list(call.get("pads", [0] * 2 * rank))
    sides = [pad for i in reversed(range(rank)) for pad in (pads[i], pads[i + rank])]

    def compute(x: Tensor, weight: Tensor, bias: Tensor = None) -> Tensor:
        functional = call.torch.nn.functional
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
        return convolve(
            functional.pad(x, sides),
            weight,
            bias,
            stride=list(call.get("strides", [1] * rank)),
            dilation=list(call.get("dilations", [1] * rank)),
            groups=call.get("group", 1),
        )

    return _rounded(call, compute, *call.inputs)


def _layer_normalization(call: Call) -> Tensor:
    """Statistics in fp32 (stash_type 1), the rest in the dtype of the node: as ONNX defines it."""
    x, scale, *rest = call.inputs
    axes = list(range(call.get("axis", -1) % x.dim(), x.dim()))
    single = x.to(call.torch.float32)
    centred = single - single.mean(axes, keepdim=True)
    variance = (centred * centred).mean(axes, keepdim=True)
    normal = (centred / (variance + call.get("epsilon", 1e-5)).sqrt()).to(x.dtype)
    scaled = normal * scale
    return scaled + rest[0] if rest else scaled


def _gelu(call: Call) -> Tensor:
    approximate = call.get("approximate", "none")
    return call.torch.nn.functional.gelu(call.inputs[0], approximate=approximate)


def _softmax(call: Call) -> Tensor:
    return call.torch.softmax(call.inputs[0], call.get("axis", -1))


def _reshape(call: Call) -> Tensor:
    x, sizes = call.inputs[0], call.ints(1)
    if not call.get("allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _unsqueeze(call: Call) -> Tensor:
    x, axes = call.inputs[0], call.ints(1)
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(call: Call) -> Tensor:
    x = call.inputs[0]
    axes = call.ints_or(1, [i for i, size in enumerate(x.shape) if size == 1])
    return x.squeeze([axis % x.dim() for axis in axes])


def _split(call: Call) -> Sequence[Tensor]:
    x, axis = call.inputs[0], call.get("axis", 0)
    step = -(-x.shape[axis] // call.num_outputs)  # the last part may be smaller
    sizes = call.ints_or(1, [])
    parts: Sequence[Tensor] = call.torch.split(x, sizes or step, axis)
    return parts


def _slice(call: Call) -> Tensor:
    x, starts, ends = call.inputs[0], call.ints(1), call.ints(2)
    axes = call.ints_or(3, list(range(len(starts))))
    steps = call.ints_or(4, [1] * len(starts))
    index: list[slice] = [slice(None)] * x.dim()
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index[axis] = slice(start, end, step)
    return x[tuple(index)]


def _gather(call: Call) -> Tensor:
    x, indices = call.inputs
    axis = call.get("axis", 0) % x.dim()
    flat = (indices.to(call.torch.int64) % x.shape[axis]).flatten()
    picked = x.index_select(axis, flat)
    return picked.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _shape(call: Call) -> Tensor:
    sizes = list(call.inputs[0].shape)[call.get("start", 0) : call.get("end", None)]
    return call.torch.tensor(sizes, dtype=call.torch.int64)


def _expand(call: Call) -> Tensor:
    x, sizes = call.inputs[0], call.ints(1)
    return x.expand(call.torch.broadcast_shapes(x.shape, sizes))


def _range(call: Call) -> Tensor:
    start, limit, delta = (x.item() for x in call.inputs)
    return call.torch.arange(start, limit, delta, dtype=call.inputs[0].dtype)


def _clip(call: Call) -> Tensor:
    low, high = (*call.inputs[1:], None, None)[:2]
    return call.torch.clamp(call.inputs[0], low, high)


def _reduce_sum(call: Call) -> Tensor:
    x = call.inputs[0]
    axes = call.ints_or(1, list(range(x.dim())))
    keep = bool(call.get("keepdims", 1))
    return _rounded(call, lambda t: t.sum(axes, keepdim=keep), x)


def _extreme(call: Call, reduce: str) -> Tensor:
    x = call.inputs[0]
    axes = call.ints_or(1, list(range(x.dim())))
    return getattr(x, reduce)(axes, keepdim=bool(call.get("keepdims", 1)))


def _top_k(call: Call) -> Sequence[Tensor]:
    x, [count], axis = call.inputs[0], call.ints(1), call.get("axis", -1)
    # Of equal values the first: torch.topk leaves that open.
    values, indices = x.sort(dim=axis, descending=True, stable=True)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


def _argmax(call: Call) -> Tensor:
    x, axis = call.inputs[0], call.get("axis", 0)
    # Of equal values the first: torch leaves that open.
    is_best = (x == x.amax(axis, keepdim=True)).to(call.torch.int8)
    return is_best.argmax(axis, keepdim=bool(call.get("keepdims", 1)))


def _div(call: Call) -> Tensor:
    a, b = call.inputs
    return a / b if a.is_floating_point() else call.torch.div(a, b, rounding_mode="trunc")


Operator = Callable[[Call], Any]

# Operator -> what computes it. Cast needs the table of dtypes, see ``half_evaluator``.
OPERATORS: dict[str, Operator] = {
    "Add": lambda call: call.inputs[0] + call.inputs[1],
    "ArgMax": _argmax,
    "Clip": _clip,
    "Concat": lambda call: call.torch.cat(list(call.inputs), call.attributes["axis"]),
    "Conv": _conv,
    "Cos": lambda call: call.inputs[0].cos(),
    "Div": _div,
    "Equal": lambda call: call.inputs[0] == call.inputs[1],
    "Expand": _expand,
    "Gather": _gather,
    "GatherElements": lambda call: call.inputs[0].gather(call.get("axis", 0), call.inputs[1]),
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Identity": lambda call: call.inputs[0],
    "LayerNormalization": _layer_normalization,
    "Less": lambda call: call.inputs[0] < call.inputs[1],
    "MatMul": _matmul,
    "Mul": lambda call: call.inputs[0] * call.inputs[1],
    "Neg": lambda call: -call.inputs[0],
    "Not": lambda call: ~call.inputs[0],
    "Range": _range,
    "ReduceMax": lambda call: _extreme(call, "amax"),
    "ReduceMin": lambda call: _extreme(call, "amin"),
    "ReduceSum": _reduce_sum,
    "Relu": lambda call: call.inputs[0].relu(),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sin": lambda call: call.inputs[0].sin(),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": lambda call: call.inputs[0] - call.inputs[1],
    "TopK": _top_k,
    "Transpose": lambda call: call.inputs[0].permute(list(call.attributes["perm"])),
    "Unsqueeze": _unsqueeze,
    "Where": lambda call: call.torch.where(*call.inputs),
}
