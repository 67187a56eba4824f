"""Graphs on a GPU provider of onnxruntime, with inputs and outputs in device memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from tap_deploy.errors import SessionError
from tap_deploy.graphs import GraphSpec
from tap_deploy.sessions.contract import resolve_shape
from tap_deploy.sessions.device_graph import DeviceExecutor, DeviceGraph
from tap_deploy.sessions.onnxruntime import first_line, import_onnxruntime, load_session
from tap_deploy.sessions.providers import Provider

# The stream orders our copies and its runs; waiting after each run would undo that.
DO_NOT_WAIT = ("disable_synchronize_execution_providers", "1")


class OnnxRuntimeGraph(DeviceGraph):
    """A graph on a GPU provider; it is loaded once per stream, as a session has one stream."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: GraphSpec,
        provider: Provider,
        limits: Mapping[str, int],
    ) -> None:
        """Remember what to load.

        Args:
            path: the ONNX file.
            spec: what the graph must look like.
            provider: who is to run it.
            limits: largest size of each dynamic axis.
        """
        axes = {axis for tensor in spec.inputs for axis in tensor.dynamic_axes.values()}
        self.spec, self._path, self._provider = spec, path, provider
        self.limits = {axis: limits[axis] for axis in axes}
        self.minima = dict.fromkeys(axes, 1)
        self._sessions: dict[int, Any] = {}

    def executor(self, stream: int, scratch_address: int) -> OnnxRuntimeExecutor:
        """Return a new IO binding to the session of a stream."""
        session = self._sessions.get(stream)
        if session is None:
            provider = dataclasses.replace(self._provider, stream=stream)
            session = load_session(self._path, self.spec, provider=provider)
            self._sessions[stream] = session
        return OnnxRuntimeExecutor(self.spec, session, self._provider.device_index)

    def close(self) -> None:
        """Drop the sessions."""
        self._sessions.clear()

    def remedy(self, axis: str) -> str:
        """What to do about a size beyond the limits."""
        option = {"P": "max_prompts", "N": "max_points"}.get(axis)
        return f"raise DeviceOptions.{option}" if option else super().remedy(axis)


class OnnxRuntimeExecutor(DeviceExecutor):
    """An IO binding at device addresses."""

    def __init__(self, spec: GraphSpec, session: Any, device_index: int) -> None:
        self._spec, self._session, self._device_index = spec, session, device_index
        self._binding = session.io_binding()
        self._options = import_onnxruntime().RunOptions()
        self._options.add_run_config_entry(*DO_NOT_WAIT)
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
        """Never: a run may allocate, which a recording does not allow."""
        return False

    def close(self) -> None:
        """Let go of binding and session."""
        self._binding = self._session = None

    def _bind_all(self) -> None:
        for tensors, bind in (
            (self._spec.inputs, self._binding.bind_input),
            (self._spec.outputs, self._binding.bind_output),
        ):
            for spec in tensors:
                shape = resolve_shape(spec, self._sizes)
                place = (self._addresses[spec.name], shape)
                if self._bound.get(spec.name) != place:
                    dtype = np.dtype(spec.dtype)
                    bind(spec.name, "cuda", self._device_index, dtype, shape, place[0])
                    self._bound[spec.name] = place
