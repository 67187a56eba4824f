"""A session without a backend, for tests of the code above ``Session``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tap_deploy.graphs import GraphSpec
from tap_deploy.sessions.contract import Session, Tensors

Compute = Callable[[Tensors], Tensors]


class FakeSession(Session):
    """Runs a Python function instead of a graph and records its calls.

    Attributes:
        compute: maps inputs to outputs; missing outputs are zeros.
        closed: whether ``close`` was called.
        calls: shapes of the inputs of every call, by name.
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
        """Set ``closed``."""
        self.closed = True
