"""``DeviceGraph`` on a GPU execution provider of onnxruntime."""

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
# Without this option, a run waits for the GPU and cannot be recorded. With it, onnxruntime leaks
# the host memory from which some operators upload tables, so it is only for graphs without them.
DO_NOT_WAIT = ("disable_synchronize_execution_providers", "1")

# Older versions reuse host memory that a recorded copy still reads.
RECORDS_SINCE = (1, 31)


class OnnxRuntimeGraph(DeviceGraph):
    """A graph on a GPU provider, loaded once per stream because a session has one stream.

    Runs of the CUDA provider are recorded by stream capture, like those of an engine.
    onnxruntime's own CUDA graphs synchronise after each replay, are bound to one thread, and fail
    if another thread allocates during the capture.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: GraphSpec,
        provider: Provider,
        checked: Callable[[Callable[[], Any]], Any] = lambda load: load(),
    ) -> None:
        """Store the arguments; ``executor`` loads the graph.

        Args:
            path: the ONNX file.
            spec: expected inputs and outputs.
            provider: provider that runs the graph, with the largest size of each dynamic axis.
            checked: calls a function that loads the file, and checks that the file is the right
                one, see ``Bundle.loaded``.
        """
        axes = {axis for tensor in spec.inputs for axis in tensor.dynamic_axes.values()}
        self.spec, self._path, self._provider, self._checked = spec, path, provider, checked
        self.limits = {axis: provider.limits[axis] for axis in axes}
        self.minima = dict.fromkeys(axes, 1)
        self.can_record = provider.record and provider.name == CUDA and _can_be_recorded(spec)
        self._sessions: dict[int, Any] = {}
        self._executors: list[OnnxRuntimeExecutor] = []

    def executor(self, stream: int, scratch_address: int) -> OnnxRuntimeExecutor:
        """Create an IO binding to the session of a stream."""
        session = self._sessions.get(stream)
        if session is None:
            session = self._sessions[stream] = self._load(stream)
        executor = OnnxRuntimeExecutor(self, session, self._provider.device_index)
        self._executors.append(executor)
        return executor

    def _load(self, stream: int) -> Any:
        provider = dataclasses.replace(self._provider, stream=stream, record=self.can_record)
        try:
            return self._checked(lambda: load_session(self._path, self.spec, provider=provider))
        except SessionError as exc:
            # onnxruntime cannot record graphs with control flow or with copies to the CPU.
            if not self.can_record or "cannot use the" not in str(exc):
                raise
            self.can_record = False
            logger.warning("CUDA graphs are off, captions take longer: %s", str(exc))
            return self._load(stream)

    def close(self) -> None:
        """Drop the executors and sessions; onnxruntime frees unreferenced sessions."""
        for executor in self._executors:
            executor.close()
        self._executors.clear()
        self._sessions.clear()

    def remedy(self, axis: str) -> str:
        """Return how to raise the limit of an axis, for the error message."""
        option = {"P": "max_prompts", "N": "max_points"}.get(axis)
        return f"raise DeviceOptions.{option}" if option else super().remedy(axis)


class OnnxRuntimeExecutor(DeviceExecutor):
    """An IO binding to device addresses.

    onnxruntime copies inputs that the CPU consumes when they are bound, not when the graph runs.
    Such inputs are therefore bound again for each run, after waiting for the GPU.
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
        """Store the sizes; onnxruntime takes shapes with each binding."""
        self._sizes = dict(sizes)

    def bind(self, name: str, address: int) -> None:
        """Store the address."""
        self._addresses[name] = address

    def enqueue(self) -> None:
        """Bind changed tensors and run."""
        try:
            self._bind_all()
            self._session.run_with_iobinding(self._binding, self._options)
        # onnxruntime raises one class per status code, without a common base.
        except Exception as exc:
            self._bound.clear()
            raise SessionError(
                f"graph {self._spec.name}: onnxruntime failed: {first_line(exc)}"
            ) from exc

    def can_record(self) -> bool:
        """Whether the session was loaded for recording and no input goes through the CPU."""
        return self._graph.can_record and not self._copied

    def record(self, memory: DeviceMemory, stream: int, then: Callable[[], None]) -> Recording:
        """Record a run with the current sizes and addresses, followed by ``then``.

        Raises:
            SessionError: the run cannot be recorded.
        """
        # With new shapes, the first run measures the memory it needs, and the second one allocates
        # it as one block. A recording must not allocate.
        self.enqueue()
        try:
            return super().record(memory, stream, then)
        except SessionError:
            self.enqueue()  # allocates what was missing during the recording
            return super().record(memory, stream, then)

    def close(self) -> None:
        """Drop binding and session."""
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
    """Whether this onnxruntime keeps host memory alive that a recorded run reads."""
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
    """Return the inputs that onnxruntime copies to the CPU; all inputs if it cannot tell."""
    if not hasattr(session, "get_input_memory_infos"):  # before 1.23.2
        return {tensor.name for tensor in spec.inputs}
    infos = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    copied = {node.name for node, info in infos if info.name == "Cpu"}
    if copied:
        logger.warning(
            "graph %s: %s is used on the CPU, each run waits for it", spec.name, ", ".join(copied)
        )
    return copied
