"""The pipeline on a GPU: owns graphs and lanes, and frees them in the right order."""

from __future__ import annotations

import atexit
import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tap_deploy import graphs
from tap_deploy.config import TapConfig
from tap_deploy.errors import SessionError
from tap_deploy.graphs import GraphSpec
from tap_deploy.sessions.gpu.embeddings import EmbeddingStore
from tap_deploy.sessions.gpu.graph import DeviceGraph, size_bytes
from tap_deploy.sessions.gpu.lane import DeviceLane
from tap_deploy.sessions.gpu.memory import DeviceMemory
from tap_deploy.sessions.lane_pool import LanePool
from tap_deploy.sessions.options import DeviceOptions
from tap_deploy.sessions.pipeline import CLOSED, Lane, Pipeline
from tap_deploy.sessions.processes import ProcessBound

LoadGraph = Callable[[GraphSpec], DeviceGraph]


class DevicePipeline(Pipeline):
    """A pipeline whose graphs run on a GPU; see ``DeviceLane`` for the data transfers.

    The constructor allocates everything. ``close``, garbage collection or the end of the program
    frees it, whichever comes first.

    Attributes:
        lanes: all lanes, one per context.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        load: LoadGraph,
        specs: Mapping[str, GraphSpec],
        config: TapConfig,
        options: DeviceOptions,
    ) -> None:
        """Load the three graphs and allocate buffers for their largest calls.

        Args:
            memory: the GPU.
            load: loads a graph; called once per graph, with CUDA activated.
            specs: expected inputs and outputs of the graphs, by name.
            config: sizes of the model.
            options: GPU options.

        Raises:
            SessionError: a graph does not load, or out of memory; everything is freed again.
        """
        self._memory = memory
        resources = _Resources(memory)
        try:
            with memory.activated():
                device_graphs = {n: resources.add_graph(load(s)) for n, s in specs.items()}
                embeddings = specs[graphs.PROMPT_DECODER].inputs[0]
                itemsize = np.dtype(embeddings.dtype).itemsize
                resources.store = EmbeddingStore(
                    memory, size_bytes(embeddings, {}, itemsize), _downloader(weakref.ref(self))
                )
                for _ in range(options.contexts):
                    lane = DeviceLane(memory, device_graphs, config, resources.store)
                    resources.lanes.append(lane)
                    lane.allocate(device_graphs, options)
        except BaseException:
            resources.close()
            raise
        self._embeddings_shape = tuple(int(axis) for axis in embeddings.shape)
        self._pool = LanePool(resources.lanes, CLOSED)
        self.max_prompts = min(
            device_graphs[name].limits["P"] for name in (graphs.PROMPT_DECODER, graphs.TEXT_DECODER)
        )
        self.max_images = device_graphs[graphs.IMAGE_ENCODER].limits["B"]
        self.lanes = tuple(resources.lanes)
        self._all_lanes = threading.Lock()
        self._replays = options.cuda_graphs and device_graphs[graphs.TEXT_DECODER].can_record
        # Registered with atexit here instead of by finalize: it must run before the hooks that
        # CUDA packages registered at import, while the CUDA context still exists.
        self._finalizer = weakref.finalize(self, resources.close)
        self._finalizer.atexit = False
        atexit.register(self._finalizer)

    @contextlib.contextmanager
    def lane(self) -> Iterator[Lane]:
        """Lend a lane, and wait until it is idle afterwards, also after an error."""
        with self._pool.taken() as lane, self._memory.activated():
            try:
                yield lane
            except BaseException:
                # Report the original error, not one of the synchronisation.
                with contextlib.suppress(Exception):
                    lane.synchronize()
                raise
            lane.synchronize()

    @contextlib.contextmanager
    def all_lanes(self) -> Iterator[Sequence[Lane]]:
        """Lend all lanes, after waiting for running calls."""
        self._pool.require_free("warmed up")
        # One caller at a time: two that each hold some of the lanes would deadlock.
        with self._all_lanes, contextlib.ExitStack() as stack:
            yield [stack.enter_context(self.lane()) for _ in self.lanes]

    def download(self, address: int) -> np.ndarray:
        """Copy embeddings to the host, float32 ``[1, C, grid, grid]``."""
        with self._pool.taken() as lane, self._memory.activated():
            return lane.download(address, self._embeddings_shape)

    def require_replay(self) -> None:
        """Check, after captions were written twice, that steps replayed as CUDA graphs.

        Does nothing if CUDA graphs are disabled or not supported.

        Raises:
            SessionError: no step was replayed.
        """
        if self._replays and not self.steps_replayed:
            raise SessionError(
                "no caption step was replayed as a CUDA graph; expected those of the second run; "
                "the log says why; build engines of an older release again with: tap-export build"
            )

    @property
    def steps_replayed(self) -> int:
        """Number of caption steps replayed as CUDA graphs, in all lanes."""
        return sum(lane.steps_replayed for lane in self.lanes)

    def close(self) -> None:
        """Wait for running calls, then free everything."""
        if self._pool.close():
            atexit.unregister(self._finalizer)
            self._finalizer()


class _Resources(ProcessBound):
    """The resources of a pipeline; holds no reference to it, so that it can be collected."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._graphs: list[DeviceGraph] = []
        self.lanes: list[DeviceLane] = []
        self.store: EmbeddingStore | None = None

    def add_graph(self, graph: DeviceGraph) -> DeviceGraph:
        """Register a loaded graph and return it."""
        self._graphs.append(graph)
        return graph

    def close(self) -> None:
        """Free everything in order of dependency, continuing after errors.

        The order is: recordings, execution contexts and engines, streams and buffers of the lanes,
        embeddings.
        """
        if self.is_of_another_process:  # a forked child runs this at its exit
            return
        # At exit, or after a lost GPU, the context may be gone.
        with contextlib.suppress(SessionError), self._memory.activated():
            for free in (
                *(lane.stop for lane in self.lanes),
                *(graph.close for graph in self._graphs),
                *(lane.close for lane in self.lanes),
                *([self.store.close] if self.store is not None else []),
            ):
                with contextlib.suppress(SessionError):
                    free()
        self.lanes.clear()
        self._graphs.clear()


def _downloader(pipeline: weakref.ref[DevicePipeline]) -> Callable[[int], np.ndarray]:
    """Return ``pipeline.download`` without a strong reference to the pipeline."""

    def download(address: int) -> np.ndarray:
        alive = pipeline()
        if alive is None:
            raise SessionError(CLOSED)
        return alive.download(address)

    return download
