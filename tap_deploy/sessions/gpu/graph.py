"""A graph whose inputs and outputs are device addresses: what the engines have in common."""

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
    "T": "cache slots",
    "K": "candidates per token",
}


class Recording(abc.ABC):
    """A run that was recorded as a CUDA graph: the same work at the same addresses."""

    @abc.abstractmethod
    def launch(self) -> None:
        """Put the work into the stream that it was recorded in, and return.

        Raises:
            SessionError: the backend refused.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Give it back; its stream is idle."""


class CapturedWork(Recording):
    """What a stream captured."""

    def __init__(self, memory: DeviceMemory, stream: int, work: Callable[[], None]) -> None:
        """Capture ``work``, without doing it.

        Raises:
            SessionError: it cannot be captured.
        """
        self._memory, self._stream = memory, stream
        self._graph = memory.capture(stream, work)

    def launch(self) -> None:
        """Replay it."""
        self._memory.launch(self._graph, self._stream)

    def close(self) -> None:
        """Destroy the graph."""
        self._memory.destroy_graph(self._graph)


class DeviceExecutor(abc.ABC):
    """One way through a graph: its own shapes and addresses, in one stream."""

    @abc.abstractmethod
    def set_sizes(self, sizes: Mapping[str, int]) -> None:
        """Fix the dynamic axes of all inputs, by axis name."""

    @abc.abstractmethod
    def bind(self, name: str, address: int) -> None:
        """Say where an input or output lies; it stays there until it is bound elsewhere."""

    @abc.abstractmethod
    def enqueue(self) -> None:
        """Put one run into the stream and return.

        Raises:
            SessionError: the backend refused.
        """

    def can_record(self) -> bool:
        """Whether the next run could be recorded."""
        return True

    def record(self, memory: DeviceMemory, stream: int, then: Callable[[], None]) -> Recording:
        """Record a run with the sizes and addresses of now, and ``then`` behind it.

        Args:
            memory: the GPU.
            stream: the executor's.
            then: puts more work into the stream.

        Raises:
            SessionError: it cannot be recorded.
        """

        def work() -> None:
            self.enqueue()
            then()

        return CapturedWork(memory, stream, work)

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of what the backend holds for it; its stream is idle."""


class DeviceGraph(abc.ABC):
    """A loaded graph on a GPU; names, dtypes and shapes have been held against ``spec``.

    limits: axis name -> largest size, for the dynamic axes.
    minima: axis name -> smallest size.
    scratch_bytes: memory that an executor needs while it runs. Executors of one stream can
        share it, as they run one after the other.
    can_record: whether runs can be recorded at all.
    """

    spec: GraphSpec
    limits: Mapping[str, int]
    minima: Mapping[str, int]
    scratch_bytes: int = 0
    can_record: bool = False

    @abc.abstractmethod
    def executor(self, stream: int, scratch_address: int) -> DeviceExecutor:
        """Return a new executor for a stream."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free the graph and all of its executors."""

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Compare sizes of dynamic axes with the limits.

        Raises:
            InputError: a size is beyond what the graph was made for.
        """
        for axis, size in sizes.items():
            if axis in self.limits and size > self.limits[axis]:
                raise InputError(
                    f"graph {self.spec.name} takes at most {self.limits[axis]} "
                    f"{WHAT_AXES_COUNT[axis]}, got {size}; {self.remedy(axis)}"
                )

    def remedy(self, axis: str) -> str:
        """What to do about a size beyond the limits."""
        option = {"P": "max-prompts", "N": "max-points"}.get(axis)
        return f"build an engine with a larger --{option}" if option else "split the call"


def axis_bounds(
    spec: GraphSpec, shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return smallest and largest size of each dynamic axis.

    Args:
        spec: the graph.
        shapes: input name -> its smallest and its largest shape.

    Raises:
        SessionError: an axis that inputs share has no size that all of them take.
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
    """Return the bytes of a tensor once its dynamic axes are known."""
    total = itemsize
    for axis in spec.shape:
        total *= sizes[axis] if isinstance(axis, str) else axis
    return total
