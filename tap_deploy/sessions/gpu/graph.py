"""Interfaces of a graph with inputs and outputs in device memory, common to GPU backends."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping

from tap_deploy.errors import InputError, SessionError
from tap_deploy.graphs import GraphSpec, TensorSpec
from tap_deploy.sessions.gpu.memory import DeviceMemory

WHAT_AXES_COUNT = {
    "B": "pictures",
    "P": "prompts",
    "N": "points in a prompt",
    "M": "masks per prompt",
    "Q": "prompts with masks",
    "T": "cache slots",
    "K": "candidates per token",
}


class Recording(abc.ABC):
    """A run recorded as a CUDA graph: the same work at the same addresses."""

    @abc.abstractmethod
    def launch(self) -> None:
        """Enqueue the work in the stream it was recorded in, and return.

        Raises:
            SessionError: the backend failed.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Free the recording; its stream must be idle."""


class CapturedWork(Recording):
    """A recording made by stream capture."""

    def __init__(self, memory: DeviceMemory, stream: int, work: Callable[[], None]) -> None:
        """Capture the kernels that ``work`` enqueues, without executing them.

        Raises:
            SessionError: ``work`` cannot be captured.
        """
        self._memory, self._stream = memory, stream
        self._graph = memory.capture(stream, work)

    def launch(self) -> None:
        """Replay the captured work."""
        self._memory.launch(self._graph, self._stream)

    def close(self) -> None:
        """Destroy the graph."""
        self._memory.destroy_graph(self._graph)


class DeviceExecutor(abc.ABC):
    """An execution state of a graph: its own shapes and addresses, in one stream."""

    @abc.abstractmethod
    def set_sizes(self, sizes: Mapping[str, int]) -> None:
        """Set the sizes of the dynamic axes of all inputs, by axis name."""

    @abc.abstractmethod
    def bind(self, name: str, address: int) -> None:
        """Set the device address of an input or output; it holds until the next ``bind``."""

    @abc.abstractmethod
    def enqueue(self) -> None:
        """Enqueue one run in the stream and return.

        Raises:
            SessionError: the backend failed.
        """

    def can_record(self) -> bool:
        """Whether the next run can be recorded."""
        return True

    def record(self, memory: DeviceMemory, stream: int, then: Callable[[], None]) -> Recording:
        """Record a run with the current sizes and addresses, followed by ``then``.

        Args:
            memory: the GPU.
            stream: stream of the executor.
            then: enqueues more work in the stream.

        Raises:
            SessionError: the run cannot be recorded.
        """

        def work() -> None:
            self.enqueue()
            then()

        return CapturedWork(memory, stream, work)

    @abc.abstractmethod
    def close(self) -> None:
        """Free the executor's resources; its stream must be idle."""


class DeviceGraph(abc.ABC):
    """A graph loaded on a GPU, validated against ``spec``.

    Attributes:
        spec: inputs and outputs.
        limits: axis name -> largest size, for the dynamic axes.
        minima: axis name -> smallest size, for the dynamic axes.
        scratch_bytes: scratch memory of a running executor, bytes. Executors of the same stream
            can share it, because they run one after the other.
        can_record: whether runs can be recorded as CUDA graphs.
    """

    spec: GraphSpec
    limits: Mapping[str, int]
    minima: Mapping[str, int]
    scratch_bytes: int = 0
    can_record: bool = False

    @abc.abstractmethod
    def executor(self, stream: int, scratch_address: int) -> DeviceExecutor:
        """Create an executor for a stream."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free the graph and all its executors."""

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Check sizes of dynamic axes against the limits.

        Raises:
            InputError: a size exceeds its limit.
        """
        for axis, size in sizes.items():
            if axis in self.limits and size > self.limits[axis]:
                raise InputError(
                    f"graph {self.spec.name} takes at most {self.limits[axis]} "
                    f"{WHAT_AXES_COUNT[axis]}, got {size}; {self.remedy(axis)}"
                )

    def remedy(self, axis: str) -> str:
        """Return how to raise the limit of an axis, for the error message."""
        option = {"P": "max-prompts", "N": "max-points"}.get(axis)
        return f"build an engine with a larger --{option}" if option else "split the call"


def axis_bounds(
    spec: GraphSpec, shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the smallest and the largest size of each dynamic axis.

    Args:
        spec: inputs of the graph.
        shapes: input name -> smallest and largest shape.

    Raises:
        SessionError: the inputs that share an axis have no common size.
    """
    minima: dict[str, int] = {}
    limits: dict[str, int] = {}
    for tensor in spec.inputs:
        smallest, largest = shapes[tensor.name]
        for position, axis in tensor.dynamic_axes.items():
            minima[axis] = max(minima.get(axis, 1), smallest[position])
            limits[axis] = min(limits.get(axis, largest[position]), largest[position])
    for axis, limit in limits.items():
        if minima[axis] > limit:
            raise SessionError(
                f"graph {spec.name}: no size of axis {axis} fits the profiles of all its inputs; "
                "build the engine again with: tap-export build"
            )
    return minima, limits


def size_bytes(spec: TensorSpec, sizes: Mapping[str, int], itemsize: int) -> int:
    """Return the size of a tensor for given sizes of the dynamic axes, bytes."""
    total = itemsize
    for axis in spec.shape:
        total *= sizes[axis] if isinstance(axis, str) else axis
    return total
