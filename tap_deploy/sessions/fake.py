"""A session without a backend: for tests of everything above the contract."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tap_deploy.graphs import GraphSpec
from tap_deploy.sessions.contract import Session, Tensors

Compute = Callable[[Tensors], Tensors]


class FakeSession(Session):
    """Runs a Python function in place of a graph, and records what it was given.

    ``compute`` maps inputs to some or all outputs; outputs that it leaves out are zeros.
    ``calls`` holds the shapes of the inputs of every call.
    """

    def __init__(self, spec: GraphSpec, compute: Compute | None = None) -> None:
        super().__init__(spec)
        self.compute = compute
        self.closed = False
        self.calls: list[dict[str, tuple[int, ...]]] = []

    def _run(self, inputs: Tensors, outputs: Tensors) -> None:
        self.calls.append({name: array.shape for name, array in inputs.items()})
        computed = {} if self.compute is None else self.compute(inputs)
        for name, array in outputs.items():
            np.copyto(array, computed.get(name, np.zeros((), array.dtype)))

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True
