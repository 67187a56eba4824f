"""A typed fp16 graph, run on a CPU with the rounding that a GPU would do after every node.

onnxruntime's CPU provider computes fp16 nodes in fp32 and drops the Casts between them, so that a
product beyond 65504 comes out finite. Here every value is stored in the dtype that the graph
gives it before the next node sees it.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnx_ir as ir

from tap_deploy.engines.torch_ops import OPERATORS, Call, Operator
from tap_deploy.errors import MissingDependencyError, first_line
from tap_deploy.graphs import GraphSpec
from tap_deploy.onnx_files import load_graph
from tap_deploy.optional_modules import load_module
from tap_deploy.sessions.contract import Session, Tensors


class TorchHalfSession(Session):
    """Executes a graph node by node with torch on the CPU: fp16 where it says so, fp32 elsewhere.

    A sum of products (MatMul, Gemm, Conv, ReduceSum) is accumulated in fp32 and rounded once. A
    node whose float inputs differ in dtype is refused: strongly typed builders do that as well,
    torch would promote them in silence.
    """

    def __init__(self, path: str | os.PathLike[str], spec: GraphSpec) -> None:
        super().__init__(spec)
        self._torch = _import_torch()
        model = load_graph(path)
        self._graph = model.graph
        self._weights = {
            value.name: self._torch.from_numpy(np.array(value.const_value.numpy()))
            for value in model.graph.initializers.values()
            if value.const_value is not None
        }
        self._nodes = list(model.graph)
        self._last_uses = _last_uses(self._nodes, {v.name for v in model.graph.outputs})
        self._operators: dict[str, Operator] = OPERATORS | {"Cast": self._cast}
        unknown = sorted({n.op_type for n in self._nodes} - set(self._operators))
        if unknown:
            raise self._error(
                f"the torch evaluator does not know {', '.join(unknown)}; "
                "use --evaluator onnx-reference"
            )

    def _run(self, inputs: Tensors, outputs: Tensors) -> None:
        torch = self._torch
        values: dict[str | None, Any] = dict(self._weights)
        values |= {name: torch.from_numpy(np.array(array)) for name, array in inputs.items()}
        with torch.inference_mode():
            for node, done in zip(self._nodes, self._last_uses, strict=True):
                self._compute(node, values)
                for name in done:
                    del values[name]
            for name, array in outputs.items():
                np.copyto(array, values[name].numpy(), casting="no")

    def _compute(self, node: ir.Node, values: dict[str | None, Any]) -> None:
        inputs = [None if value is None else values[value.name] for value in node.inputs]
        floats = {t.dtype for t in inputs if t is not None and t.is_floating_point()}
        if len(floats) > 1:
            raise self._error(f"node {node.name} mixes {sorted(map(str, floats))}; not typed")
        call = Call(
            torch=self._torch,
            inputs=inputs,
            attributes={name: attribute.value for name, attribute in node.attributes.items()},
            num_outputs=len(node.outputs),
        )
        try:
            result = self._operators[node.op_type](call)
        except (RuntimeError, IndexError, TypeError, ValueError) as exc:
            raise self._error(f"node {node.name} failed: {exc}") from exc
        results = result if isinstance(result, list | tuple) else [result]
        for value, tensor in zip(node.outputs, results, strict=True):
            values[value.name] = tensor

    def _cast(self, call: Call) -> Any:
        name = ir.DataType(call.attributes["to"]).numpy().name
        return call.inputs[0].to(getattr(self._torch, name))

    def close(self) -> None:
        """Drop the weights."""
        self._weights.clear()


def _last_uses(nodes: list[ir.Node], kept: set[str | None]) -> list[list[str | None]]:
    """Return, per node, the values that nothing needs after it."""
    seen, result = set(kept), []
    for node in reversed(nodes):
        names = {v.name for v in (*node.inputs, *node.outputs) if v is not None}
        result.append([name for name in names if name not in seen])
        seen |= names
    return result[::-1]


def _import_torch() -> Any:
    try:
        return load_module("torch")
    except ImportError as exc:
        raise MissingDependencyError(
            f"the torch evaluator needs torch, which cannot be loaded ({first_line(exc)}); "
            'install it with: pip install "tap-deploy[export]"'
        ) from exc
