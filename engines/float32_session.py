"""A session that shows float32 at its borders, whatever its graph computes in."""

from __future__ import annotations

import dataclasses

import numpy as np

from tap_deploy.graphs import GraphSpec, TensorSpec
from tap_deploy.sessions.contract import Session, Tensors


class Float32Session(Session):
    """Wraps a session, so that graphs of different precisions can follow one another.

    Closing it closes the session inside.
    """

    def __init__(self, inner: Session) -> None:
        super().__init__(
            GraphSpec(
                inner.spec.name,
                inputs=tuple(map(_widened, inner.spec.inputs)),
                outputs=tuple(map(_widened, inner.spec.outputs)),
            )
        )
        self._inner = inner

    def _run(self, inputs: Tensors, outputs: Tensors) -> None:
        dtypes = {spec.name: spec.dtype for spec in self._inner.spec.inputs}
        found = self._inner.run(
            {name: array.astype(dtypes[name], copy=False) for name, array in inputs.items()}
        )
        for name, array in outputs.items():
            np.copyto(array, found[name])

    def close(self) -> None:
        """Close the session inside."""
        self._inner.close()


def float32_session(session: Session) -> Session:
    """Return the session itself if it is float32 at its borders, else a wrapped one."""
    tensors = (*session.spec.inputs, *session.spec.outputs)
    narrow = any(spec.dtype == "float16" for spec in tensors)
    return Float32Session(session) if narrow else session


def _widened(spec: TensorSpec) -> TensorSpec:
    return dataclasses.replace(spec, dtype="float32") if spec.dtype == "float16" else spec
