"""A ``Session`` for a graph on a GPU, with host arrays."""

from __future__ import annotations

import atexit
import contextlib
import threading
import weakref
from collections.abc import Callable

import numpy as np

from tap_deploy import graphs
from tap_deploy.errors import SessionError
from tap_deploy.graphs import GraphSpec
from tap_deploy.sessions.contract import Session, Tensors
from tap_deploy.sessions.gpu.buffers import Buffers, StagedTensor
from tap_deploy.sessions.gpu.graph import DeviceExecutor, DeviceGraph, size_bytes
from tap_deploy.sessions.gpu.memory import DeviceMemory
from tap_deploy.sessions.processes import ProcessBound


class DeviceSession(Session):
    """Runs an engine on host arrays, to verify graphs one by one.

    Every call copies all inputs to the GPU and all outputs back; predictors use ``DevicePipeline``
    instead. Concurrent calls run one after the other.
    """

    def __init__(self, memory: DeviceMemory, load: Callable[[], DeviceGraph]) -> None:
        """Load a graph and allocate buffers for its largest sizes.

        Raises:
            SessionError: the graph does not load, or out of memory; everything is freed again.
        """
        self._memory = memory
        self._lock = threading.Lock()
        self._resources = _Resources(memory)
        with memory.activated():
            try:
                graph = self._resources.graph = load()
                super().__init__(graph.spec)
                self.limits = {a: n for a, n in graph.limits.items() if a != "B"}  # B is split
                buffers = self._resources.buffers
                self._stream = buffers.stream()
                scratch = buffers.device(graph.scratch_bytes)
                self._executor = graph.executor(self._stream, scratch)
                self._tensors = _allocated(graph, buffers, self._executor)
            except BaseException:
                self._resources.close()
                raise
        # See DevicePipeline: this must run before the exit hooks of CUDA packages.
        self._finalizer = weakref.finalize(self, self._resources.close)
        self._finalizer.atexit = False
        atexit.register(self._finalizer)

    def _run(self, inputs: Tensors, outputs: Tensors) -> None:
        with self._lock, self._memory.activated():
            graph = self._resources.graph
            if graph is None:
                raise self._error("the session is closed; load it again")
            for part in _parts(graph, inputs):
                taken = {name: array[part] for name, array in inputs.items()}
                self._run_part(graph, taken, {n: a[part] for n, a in outputs.items()})

    def _run_part(self, graph: DeviceGraph, inputs: Tensors, outputs: Tensors) -> None:
        sizes = _sizes(self.spec, inputs)
        graph.check_sizes(sizes)
        try:
            for spec in self.spec.inputs:
                self._tensors[spec.name].upload(inputs[spec.name], self._stream)
            self._executor.set_sizes(sizes)
            self._executor.enqueue()
            fetched = {
                name: self._tensors[name].download(array.shape, array.dtype.name, self._stream)
                for name, array in outputs.items()
            }
        finally:  # also after an error, because the next call reuses the buffers
            self._memory.synchronize(self._stream)
        for name, array in outputs.items():
            np.copyto(array, fetched[name])

    def close(self) -> None:
        """Free graph and buffers. Closing twice has no effect."""
        if self.is_of_another_process:
            return
        with self._lock:
            atexit.unregister(self._finalizer)
            self._finalizer()


class _Resources(ProcessBound):
    """The resources of a session; holds no reference to it, so that it can be collected."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory, self.buffers = memory, Buffers(memory)
        self.graph: DeviceGraph | None = None

    def close(self) -> None:
        """Free the graph with its executor, then the buffers and the stream that it uses."""
        if self.is_of_another_process:  # a forked child runs this at its exit
            return
        with contextlib.suppress(SessionError), self._memory.activated():
            if self.graph is not None:
                with contextlib.suppress(SessionError):
                    self.graph.close()
            self.buffers.close()
        self.graph = None


def _allocated(
    graph: DeviceGraph, buffers: Buffers, executor: DeviceExecutor
) -> dict[str, StagedTensor]:
    tensors = {}
    for spec in (*graph.spec.inputs, *graph.spec.outputs):
        itemsize = np.dtype(spec.dtype).itemsize
        tensors[spec.name] = buffers.staged(size_bytes(spec, graph.limits, itemsize))
        executor.bind(spec.name, tensors[spec.name].address)
    return tensors


def _parts(graph: DeviceGraph, inputs: Tensors) -> list[slice]:
    """Split a batch of pictures into batches that the engine takes; other inputs stay whole."""
    most = graph.limits.get("B")
    if most is None:
        return [slice(None)]
    pictures = len(inputs[graphs.IMAGES])
    return [slice(start, start + most) for start in range(0, pictures, most)]


def _sizes(spec: GraphSpec, inputs: Tensors) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        sizes |= {a: inputs[tensor.name].shape[i] for i, a in tensor.dynamic_axes.items()}
    return sizes
