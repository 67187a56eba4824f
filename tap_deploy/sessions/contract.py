"""The ``Session`` interface, which runs a graph on host arrays, and its input validation."""

from __future__ import annotations

import abc
import types
from collections.abc import Mapping, Sequence

import numpy as np

from tap_deploy.errors import SessionError
from tap_deploy.graphs import Axis, GraphSpec, TensorSpec
from tap_deploy.sessions.processes import ProcessBound

_FLOATS = ("float16", "float32")


Tensors = Mapping[str, np.ndarray]


class Session(ProcessBound, abc.ABC):
    """A loaded graph.

    Backends implement ``_run``, whose arguments have been validated against ``spec``. Thread-safe
    unless a backend says otherwise. Usable only in the process that created it, see
    ``ProcessBound``.

    Attributes:
        spec: inputs and outputs of the graph.
        limits: axis name -> largest size, for engines; empty if any size works.
    """

    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec
        self.limits: Mapping[str, int] = {}

    def run(self, inputs: Tensors, into: Tensors | None = None) -> dict[str, np.ndarray]:
        """Run the graph once.

        Args:
            inputs: one C-contiguous array per input of the spec, by name.
            into: preallocated output arrays, by name; other outputs are allocated.

        Returns:
            All outputs by name, including the arrays of ``into``.

        Raises:
            SessionError: a name, dtype or shape does not match the spec, the backend failed, or
                the session was created in another process.
        """
        self.require_own_process()
        into = {} if into is None else into
        self._check_names(inputs)
        sizes: dict[str, int] = {}
        for spec in self.spec.inputs:
            self._check_tensor("input", spec, inputs[spec.name], sizes)
        outputs = self._outputs(into, sizes)
        self._run(inputs, outputs)
        return outputs

    def allocate(self, shape: Sequence[int], dtype: str) -> np.ndarray:
        """Return a zeroed array that this backend reads and writes without a copy."""
        return np.zeros(tuple(shape), dtype)

    @abc.abstractmethod
    def close(self) -> None:
        """Free the resources of the backend; the session is unusable afterwards.

        In a forked process this does nothing.
        """

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.close()

    @abc.abstractmethod
    def _run(self, inputs: Tensors, outputs: Tensors) -> None:
        """Run the graph and write every output into its array in ``outputs``."""

    def _outputs(self, into: Tensors, sizes: dict[str, int]) -> dict[str, np.ndarray]:
        known = {spec.name for spec in self.spec.outputs}
        unknown = sorted(set(into) - known)
        if unknown:
            raise self._error(f"has no output {unknown[0]!r}; expected {sorted(known)}")
        outputs = {}
        for spec in self.spec.outputs:
            if spec.name in into:
                self._check_tensor("output", spec, into[spec.name], sizes)
                outputs[spec.name] = into[spec.name]
            else:
                outputs[spec.name] = np.empty(resolve_shape(spec, sizes), spec.dtype)
        return outputs

    def _check_names(self, inputs: Tensors) -> None:
        expected = {spec.name for spec in self.spec.inputs}
        if set(inputs) != expected:
            raise self._error(f"inputs are {sorted(inputs)}; expected {sorted(expected)}")

    def _check_tensor(
        self, kind: str, spec: TensorSpec, array: np.ndarray, sizes: dict[str, int]
    ) -> None:
        fits = array.dtype == np.dtype(spec.dtype) and array.ndim == len(spec.shape)
        if fits:
            fits = all(
                _axis_fits(axis, size, sizes)
                for axis, size in zip(spec.shape, array.shape, strict=True)
            )
        if not fits:
            found = f"{array.dtype} {list(array.shape)}"
            known = {axis: size for axis, size in sizes.items() if axis in spec.shape}
            where = f" with {known}" if known else ""
            raise self._error(f"{kind} {spec.name!r} is {found}; expected {spec}{where}")
        if not array.flags.c_contiguous:
            raise self._error(f"{kind} {spec.name!r} is not contiguous; use np.ascontiguousarray")

    def _error(self, message: str) -> SessionError:
        return SessionError(f"graph {self.spec.name}: {message}")


def _axis_fits(axis: Axis, size: int, sizes: dict[str, int]) -> bool:
    """Compare one axis; the first size (>= 1) of a dynamic axis binds it for all tensors."""
    if isinstance(axis, str):
        return size >= 1 and sizes.setdefault(axis, size) == size
    return size == axis


Found = Mapping[str, tuple[str, Sequence[int | str | None]]]


def check_graph(spec: GraphSpec, inputs: Found, outputs: Found) -> None:
    """Compare the inputs and outputs of a graph file with the spec.

    Args:
        spec: expected inputs and outputs.
        inputs: name -> NumPy dtype name and axes; an axis that is not an int is dynamic.
        outputs: as ``inputs``.

    Raises:
        SessionError: they differ.
    """
    for kind, found, tensors in (
        ("inputs", inputs, spec.inputs),
        ("outputs", outputs, spec.outputs),
    ):
        plain = {name: (dtype, _axes(shape)) for name, (dtype, shape) in found.items()}
        expected = {tensor.name: (tensor.dtype, _axes(tensor.shape)) for tensor in tensors}
        if plain != expected:
            raise SessionError(
                f"graph {spec.name}: {kind} of the file are {plain}; expected {expected}; "
                "was it exported by another version? Export it again"
            )


def _axes(shape: Sequence[int | str | None]) -> list[int | str]:
    """Return a shape with all dynamic axes as "*", because files may name them differently."""
    return [axis if isinstance(axis, int) else "*" for axis in shape]


def resolve_shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of a tensor for given sizes of the dynamic axes."""
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape)


def to_spec_dtypes(spec: GraphSpec, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return inputs with float arrays cast to the dtypes of a spec and made contiguous.

    Values beyond the range of float16 become infinite without a warning; verification detects
    them in the outputs.
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
    """Return outputs with float arrays cast to float32, without a copy if they already are."""
    return {
        name: array.astype(np.float32, copy=False) if array.dtype.name in _FLOATS else array
        for name, array in outputs.items()
    }
