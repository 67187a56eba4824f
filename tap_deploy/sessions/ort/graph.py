"""Graphs on a GPU provider of onnxruntime, with inputs and outputs in device memory."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tap_deploy.errors import SessionError, first_line
from tap_deploy.graphs import GraphSpec, TensorSpec
from tap_deploy.sessions.contract import resolve_shape
from tap_deploy.sessions.gpu.graph import DeviceExecutor, DeviceGraph, Recording
from tap_deploy.sessions.gpu.memory import DeviceMemory
from tap_deploy.sessions.ort.providers import CUDA, NO_GRAPH, Provider
from tap_deploy.sessions.ort.session import import_onnxruntime, load_session

logger = logging.getLogger(__name__)
# Without it, a run waits for the GPU, and cannot be recorded. With it, onnxruntime never frees the
# host memory that some operators send tables from: it is for graphs that have none of these.
DO_NOT_WAIT = ("disable_synchronize_execution_providers", "1")

# Older ones use the host memory again that a recorded copy reads.
RECORDS_SINCE = (1, 31)


class OnnxRuntimeGraph(DeviceGraph):
    """A graph on a GPU provider; it is loaded once per stream, as a session has one stream.

    Runs on CUDA's provider are recorded as those of an engine are, from outside. onnxruntime's
    own recordings wait after each replay, belong to the thread that made them, and break when
    another thread allocates meanwhile.
    """

    def __init__(self, path: str | os.PathLike[str], spec: GraphSpec, provider: Provider) -> None:
        """Remember what to load.

        Args:
            path: the ONNX file.
            spec: what the graph must look like.
            provider: who is to run it, with the largest size of each dynamic axis.
        """
        axes = {axis for tensor in spec.inputs for axis in tensor.dynamic_axes.values()}
        self.spec, self._path, self._provider = spec, path, provider
        self.limits = {axis: provider.limits[axis] for axis in axes}
        self.minima = dict.fromkeys(axes, 1)
        self.can_record = provider.record and provider.name == CUDA and _can_be_recorded(spec)
        self._sessions: dict[int, Any] = {}
        self._executors: list[OnnxRuntimeExecutor] = []

    def executor(self, stream: int, scratch_address: int) -> OnnxRuntimeExecutor:
        """Return a new IO binding to the session of a stream."""
        session = self._sessions.get(stream)
        if session is None:
            session = self._sessions[stream] = self._load(stream)
        executor = OnnxRuntimeExecutor(self, session, self._provider.device_index)
        self._executors.append(executor)
        return executor

    def _load(self, stream: int) -> Any:
        provider = dataclasses.replace(self._provider, stream=stream, record=self.can_record)
        try:
            return load_session(self._path, self.spec, provider=provider)
        except SessionError as exc:
            # onnxruntime refuses graphs with control flow, or with copies to the CPU and back.
            if not self.can_record or "cannot use the" not in str(exc):
                raise
            self.can_record = False
            logger.warning("CUDA graphs are off, captions take longer: %s", str(exc))
            return self._load(stream)

    def close(self) -> None:
        """Drop the executors and the sessions: onnxruntime frees what nobody refers to."""
        for executor in self._executors:
            executor.close()
        self._executors.clear()
        self._sessions.clear()

    def remedy(self, axis: str) -> str:
        """What to do about a size beyond the limits."""
        option = {"P": "max_prompts", "N": "max_points"}.get(axis)
        return f"raise DeviceOptions.{option}" if option else super().remedy(axis)


class OnnxRuntimeExecutor(DeviceExecutor):
    """An IO binding at device addresses.

    What the CPU consumes is copied when it is bound, not when it is run: such inputs are bound
    anew for each run, after waiting for the GPU.
    """

    def __init__(self, graph: OnnxRuntimeGraph, session: Any, device_index: int) -> None:
        self._graph, self._session, self._device_index = graph, session, device_index
        self._spec = graph.spec
        self._binding = session.io_binding()
        self._options = import_onnxruntime().RunOptions()
        for entry in (DO_NOT_WAIT, NO_GRAPH) if graph.can_record else (NO_GRAPH,):
            self._options.add_run_config_entry(*entry)
        self._copied = inputs_on_the_cpu(session, graph.spec)
        self._sizes: dict[str, int] = {}
        self._addresses: dict[str, int] = {}
        self._bound: dict[str, tuple[int, tuple[int, ...]]] = {}

    def set_sizes(self, sizes: Mapping[str, int]) -> None:
        """Remember the sizes; shapes are part of a binding here."""
        self._sizes = dict(sizes)

    def bind(self, name: str, address: int) -> None:
        """Remember the address."""
        self._addresses[name] = address

    def enqueue(self) -> None:
        """Bind what changed, and run."""
        try:
            self._bind_all()
            self._session.run_with_iobinding(self._binding, self._options)
        # onnxruntime raises a class of its own per status code, with no common base.
        except Exception as exc:
            self._bound.clear()
            raise SessionError(
                f"graph {self._spec.name}: onnxruntime failed: {first_line(exc)}"
            ) from exc

    def can_record(self) -> bool:
        """Whether the session was loaded for it and nothing waits for the host."""
        return self._graph.can_record and not self._copied

    def record(self, memory: DeviceMemory, stream: int, then: Callable[[], None]) -> Recording:
        """Record a run with the sizes and addresses of now, and ``then`` behind it.

        Raises:
            SessionError: it cannot be recorded.
        """
        # With new shapes, the first run measures what it needs, and the second allocates that in
        # one piece. A recording must not allocate.
        self.enqueue()
        try:
            return super().record(memory, stream, then)
        except SessionError:
            self.enqueue()  # outside of a recording, what it lacked can be allocated
            return super().record(memory, stream, then)

    def close(self) -> None:
        """Let go of binding and session."""
        self._binding = self._session = self._options = None
        self._bound.clear()

    def _bind_all(self) -> None:
        if self._copied:
            self._binding.synchronize_inputs()
        for spec in self._spec.inputs:
            self._bind(spec, self._binding.bind_input, anew=spec.name in self._copied)
        for spec in self._spec.outputs:
            self._bind(spec, self._binding.bind_output)

    def _bind(self, spec: TensorSpec, bind: Callable[..., None], *, anew: bool = False) -> None:
        shape = resolve_shape(spec, self._sizes)
        place = (self._addresses[spec.name], shape)
        if anew or self._bound.get(spec.name) != place:
            bind(spec.name, "cuda", self._device_index, np.dtype(spec.dtype), shape, place[0])
            self._bound[spec.name] = place


def _can_be_recorded(spec: GraphSpec) -> bool:
    """Whether this onnxruntime keeps the host memory that a recorded run reads."""
    version = import_onnxruntime().__version__
    known = tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= RECORDS_SINCE
    if not known:
        logger.warning(
            "graph %s: captions take longer: CUDA graphs need onnxruntime %d.%d, this is %s",
            spec.name,
            *RECORDS_SINCE,
            version,
        )
    return known


def inputs_on_the_cpu(session: Any, spec: GraphSpec) -> set[str]:
    """Return the inputs that onnxruntime copies to the CPU; all of them, if it does not say."""
    if not hasattr(session, "get_input_memory_infos"):  # before 1.23.2
        return {tensor.name for tensor in spec.inputs}
    infos = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    copied = {node.name for node, info in infos if info.name == "Cpu"}
    if copied:
        logger.warning(
            "graph %s: %s is used on the CPU, each run waits for it", spec.name, ", ".join(copied)
        )
    return copied
