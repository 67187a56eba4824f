"""A model on a GPU: graphs, lanes, and their end."""

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
    """Graphs on a GPU; see ``DeviceLane`` for what moves and what stays.

    The constructor allocates everything. It is freed by ``close``, when the object is collected,
    or when the program ends, whichever comes first.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        load: LoadGraph,
        specs: Mapping[str, GraphSpec],
        config: TapConfig,
        options: DeviceOptions,
    ) -> None:
        """Load three graphs and allocate for their largest calls.

        Args:
            memory: the GPU.
            load: loads a graph; called once per graph, with CUDA activated.
            specs: what the graphs must look like, by name.
            config: sizes of the model.
            options: choices of the user.

        Raises:
            SessionError: a graph does not load, or memory does not suffice; nothing is left.
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
        # Not finalize's own hook: registered here, this runs before what CUDA's packages
        # registered when they were imported, while the context still is.
        self._finalizer = weakref.finalize(self, resources.close)
        self._finalizer.atexit = False
        atexit.register(self._finalizer)

    @contextlib.contextmanager
    def lane(self) -> Iterator[Lane]:
        """Take a lane; it is idle when it is given back, also after an error."""
        with self._pool.taken() as lane, self._memory.activated():
            try:
                yield lane
            except BaseException:
                # The error that led here is the one to report.
                with contextlib.suppress(Exception):
                    lane.synchronize()
                raise
            lane.synchronize()

    @contextlib.contextmanager
    def all_lanes(self) -> Iterator[Sequence[Lane]]:
        """Take every lane, waiting for the calls that run."""
        self._pool.require_free("warmed up")
        # One at a time: two that each wait for the other's lanes would wait for ever.
        with self._all_lanes, contextlib.ExitStack() as stack:
            yield [stack.enter_context(self.lane()) for _ in self.lanes]

    def download(self, address: int) -> np.ndarray:
        """Fetch embeddings, float32 ``[1, C, grid, grid]``."""
        with self._pool.taken() as lane, self._memory.activated():
            return lane.download(address, self._embeddings_shape)

    def require_replay(self) -> None:
        """Demand that captions, written twice, were replayed as CUDA graphs where they can be.

        Raises:
            SessionError: not one step was replayed.
        """
        if self._replays and not self.steps_replayed:
            raise SessionError(
                "no caption step was replayed as a CUDA graph; expected those of the second run; "
                "the log says why; build engines of an older release again with: tap-export build"
            )

    @property
    def steps_replayed(self) -> int:
        """How many caption steps were replayed as CUDA graphs, in all lanes."""
        return sum(lane.steps_replayed for lane in self.lanes)

    def close(self) -> None:
        """Wait for the calls that run, then free everything."""
        if self._pool.close():
            atexit.unregister(self._finalizer)
            self._finalizer()


class _Resources(ProcessBound):
    """All that a pipeline must free; it does not refer to the pipeline, so it can outlive it."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._graphs: list[DeviceGraph] = []
        self.lanes: list[DeviceLane] = []
        self.store: EmbeddingStore | None = None

    def add_graph(self, graph: DeviceGraph) -> DeviceGraph:
        """Remember a loaded graph."""
        self._graphs.append(graph)
        return graph

    def close(self) -> None:
        """Free users before what they use, in spite of failures.

        Recordings come first, then contexts and engines, then the streams and buffers of the
        lanes, then embeddings.
        """
        if self.is_of_another_process:  # a fork runs this when it ends
            return
        # When the program ends, or the GPU is lost, there may be nothing to free.
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
    """Return ``pipeline.download`` without keeping the pipeline alive."""

    def download(address: int) -> np.ndarray:
        alive = pipeline()
        if alive is None:
            raise SessionError(CLOSED)
        return alive.download(address)

    return download
