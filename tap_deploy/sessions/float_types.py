"""Float dtypes at the border of a graph: the library speaks float32, a graph what its spec says."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tap_deploy.graphs import GraphSpec

_FLOATS = ("float16", "float32")


def to_spec_dtypes(spec: GraphSpec, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return inputs with their floats in the dtypes of a spec, contiguous; others as they are.

    What float16 cannot hold becomes infinite, without a warning: verification is what looks.
    """
    dtypes = {tensor.name: tensor.dtype for tensor in spec.inputs}
    with np.errstate(over="ignore"):
        return {
            name: np.ascontiguousarray(array, dtypes.get(name))
            if array.dtype.name in _FLOATS
            else array
            for name, array in inputs.items()
        }


def to_float32(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return outputs with their floats as float32; what is float32 already is not copied."""
    return {
        name: array.astype(np.float32, copy=False) if array.dtype.name in _FLOATS else array
        for name, array in outputs.items()
    }
