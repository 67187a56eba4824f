"""The result of a bisection."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from tap_deploy.verify.difference import Difference
from tap_deploy.verify.tolerances import Tolerance


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerError:
    """The error of a layer's output.

    Attributes:
        node: name of the node.
        op_type: its operator.
        tensor: name of the output.
        feed: index of the inputs with the largest error.
        error: difference from the reference on these inputs.
    """

    node: str
    op_type: str
    tensor: str
    feed: int
    error: Difference

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; infinite differences become null."""
        numbers = dataclasses.asdict(self.error).items()
        return {
            "node": self.node,
            "op_type": self.op_type,
            "tensor": self.tensor,
            "feed": self.feed,
            **{name: value if math.isfinite(value) else None for name, value in numbers},
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first layer of a graph whose output leaves tolerance.

    Attributes:
        graph: name of the graph.
        layer: the layer with its error.
        before: the last layer that it reads from, directly or through tensors that were not
            compared; it still fits. None if the layer only reads inputs of the graph.
        tolerance: bounds on the error.
    """

    graph: str
    layer: LayerError
    before: LayerError | None
    tolerance: Tolerance

    def __str__(self) -> str:
        layer, before = self.layer, self.before
        sentence = (
            f"{self.graph}: the first layer out of tolerance is {layer.node} ({layer.op_type}); "
            f"its output {layer.tensor} {self._amount(layer.error)}; expected at most "
            f"{self._bounds()}"
        )
        if before is None:
            return f"{sentence}; it reads only inputs of the graph and weights"
        return (
            f"{sentence}; the layer before it, {before.node} ({before.op_type}), fits: its output "
            f"{before.tensor} {self._amount(before.error)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "graph": self.graph,
            "layer": self.layer.to_dict(),
            "before": None if self.before is None else self.before.to_dict(),
            "tolerance": dataclasses.asdict(self.tolerance),
            "sentence": str(self),
        }

    def _amount(self, error: Difference) -> str:
        if math.isinf(error.max_abs):
            return "has NaN or infinity where only one of the graphs has it"
        largest = f"{error.max_rel:.1e} relative" if self.tolerance.relative else error.max_abs
        largest = largest if isinstance(largest, str) else f"{largest:.1e} absolute"
        return f"is off by {largest}, mean {error.mean_rel:.1e}"

    def _bounds(self) -> str:
        mean = self.tolerance.mean
        return f"{self.tolerance.max:.1e}" + ("" if mean is None else f", mean {mean:.1e}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bisection:
    """The comparison of two graphs, layer by layer.

    Attributes:
        graph: name of the graph.
        divergence: the first layer out of tolerance; None if all compared tensors fit.
        growth: errors of the residual sums and of the graph's outputs, in the order of the graph,
            up to the divergence.
        compared: number of tensors compared, up to the divergence.
        comparable: number of tensors that both graphs have and that may be compared.
        left_out: reason -> number of tensors of the reference that were not compared.
    """

    graph: str
    divergence: Divergence | None
    growth: tuple[LayerError, ...]
    compared: int
    comparable: int
    left_out: dict[str, int]

    def __str__(self) -> str:
        counted = f"{self.compared} of {self.comparable} tensors compared"
        reasons = [f"{count} left out ({why})" for why, count in self.left_out.items() if count]
        counts = ", ".join([counted, *reasons])
        if self.divergence is None:
            return f"{self.graph}: all layers are within tolerance; {counts}"
        return f"{self.divergence}; {counts}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "graph": self.graph,
            "divergence": None if self.divergence is None else self.divergence.to_dict(),
            "growth": [layer.to_dict() for layer in self.growth],
            "compared": self.compared,
            "comparable": self.comparable,
            "left_out": self.left_out,
        }
