"""``Session`` on OpenVINO, on the CPU."""

from __future__ import annotations

import contextlib
import mmap
import os
import pathlib
import queue
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tap_deploy.bundle.manifest import weights_file
from tap_deploy.errors import MissingDependencyError, SessionError, first_line
from tap_deploy.graphs import GraphSpec, TensorSpec
from tap_deploy.machine.cpu import usable_cores
from tap_deploy.optional_modules import load_module
from tap_deploy.sessions.contract import Session, Tensors, check_graph
from tap_deploy.sessions.openvino.compiled_cache import CompiledCache, drop_pages
from tap_deploy.sessions.openvino.core import DEVICE, shared_core, tensor_from_array
from tap_deploy.storage.unfinished import temporary_folder


def import_openvino() -> Any:
    """Import OpenVINO.

    Raises:
        MissingDependencyError: not installed, or broken.
    """
    try:
        return load_module("openvino")
    except ImportError as exc:
        if isinstance(exc, ModuleNotFoundError) and exc.name == "openvino":
            problem = "is not installed; install it with:"
        else:
            problem = f"cannot be loaded: {first_line(exc)}; reinstall it with:"
        raise MissingDependencyError(
            f"backend 'openvino' {problem} pip install \"tap-deploy[openvino]\""
        ) from exc


def settings(threads: int | None, *, bf16: bool) -> dict[str, Any]:
    """Return the settings of a compiled graph.

    Args:
        threads: number of threads; None for one per core available to this process. OpenVINO's
            own default ignores quotas of control groups.
        bf16: compute matrix products in bf16.
    """
    return {
        "PERFORMANCE_HINT": "LATENCY",
        # Otherwise OpenVINO takes bf16 where the CPU has it, and 8-bit activations for weights of
        # 8 bits that have none.
        "EXECUTION_MODE_HINT": "ACCURACY",
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "INFERENCE_NUM_THREADS": usable_cores() if threads is None else threads,
        # Two sessions that pin their threads to the same cores wait for each other.
        "ENABLE_CPU_PINNING": False,
    }


class OpenVinoSession(Session):
    """Runs a graph with OpenVINO on host arrays, which it reads and writes in place.

    Threads that call it at the same time wait for each other in OpenVINO, each with an inference
    request of its own.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: GraphSpec,
        *,
        threads: int | None = None,
        bf16: bool = False,
        cache: CompiledCache | None = None,
    ) -> None:
        """Load a graph.

        Args:
            path: the ONNX file.
            spec: expected inputs and outputs.
            threads: CPU threads per call; None for one per usable core.
            bf16: compute matrix products in bf16, on a CPU that can.
            cache: holds the compiled graph; None compiles it.

        Raises:
            MissingDependencyError: OpenVINO is not installed.
            SessionError: the file does not load, or does not match the spec.
        """
        super().__init__(spec)
        self._openvino = import_openvino()
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        try:
            loaded = _load(self._openvino, path, settings(threads, bf16=bf16), cache)
        except SessionError as exc:
            raise self._error(str(exc)) from exc
        self._loaded: tuple[Any, mmap.mmap | None] | None = loaded
        self._has_run = False
        compiled, _ = loaded
        inputs = _described(compiled.inputs, spec.inputs)
        check_graph(spec, inputs, _described(compiled.outputs, spec.outputs))

    def _run(self, inputs: Tensors, outputs: Tensors) -> None:
        with self._request() as request:
            try:
                for name, array in (*inputs.items(), *outputs.items()):
                    request.set_tensor(name, tensor_from_array(self._openvino, array))
                request.infer()
            except Exception as exc:
                raise self._error(f"OpenVINO failed: {_reason(exc)}") from exc

    @contextlib.contextmanager
    def _request(self) -> Iterator[Any]:
        """Lend an idle inference request, or a new one."""
        loaded = self._loaded  # keeps it alive if another thread closes the session
        if loaded is None:
            raise self._error("the session is closed; load it again")
        try:
            request = self._requests.get_nowait()
        except queue.Empty:
            request = loaded[0].create_infer_request()
        yield request
        self._requests.put(request)  # not after an error, which may leave it in any state
        if not self._has_run:
            self._has_run = True
            drop_pages(loaded[1])  # the first run has copied what it needs of the weights

    def close(self) -> None:
        """Drop the compiled graph and its requests."""
        if self.is_of_another_process:
            return
        self._loaded = None
        with contextlib.suppress(queue.Empty):
            while True:
                self._requests.get_nowait()


def executed_layers(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """Return kind and precision of each layer of a graph that OpenVINO compiled for this CPU.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        SessionError: OpenVINO cannot load the graph.
    """
    compiled, _ = _load(import_openvino(), path, settings(None, bf16=False), None)
    facts = [layer.get_rt_info() for layer in compiled.get_runtime_model().get_ordered_ops()]
    names = ("layerType", "runtimePrecision")
    return [(fact[names[0]].astype(str), fact[names[1]].astype(str)) for fact in facts]


def _load(
    openvino: Any,
    path: str | os.PathLike[str],
    config: dict[str, Any],
    cache: CompiledCache | None,
) -> tuple[Any, mmap.mmap | None]:
    """Compile a graph, or take it from the cache.

    Returns:
        The compiled graph, and the mapped file to keep for as long as the graph.

    Raises:
        SessionError: OpenVINO cannot load it.
    """
    if cache is not None:
        found = cache.load(openvino, config)
        if found is not None:
            return found
    try:
        with _weights_in_its_folder(path) as graph:
            model = _read(openvino, graph)
            compiled = shared_core(openvino).compile_model(model, DEVICE, config)
    # Its readers raise several classes without a common base.
    except Exception as exc:
        raise SessionError(f"OpenVINO cannot load {path}: {_reason(exc)}") from exc
    if cache is not None:
        cache.store(openvino, config, compiled)
    return compiled, None


@contextlib.contextmanager
def _weights_in_its_folder(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield a path of the graph whose weights OpenVINO accepts: no link to another folder.

    Bundles in caches and copies consist of links; their files are copied for the block. Hard links
    would take less time and space, but change the times of the files, which would then seem to have
    been touched while they were loaded.
    """
    graph, weights = pathlib.Path(path), pathlib.Path(weights_file(path))
    if not weights.is_file() or weights.resolve().parent == graph.parent.resolve():
        yield graph
        return
    with temporary_folder() as folder:
        for file in (graph, weights):
            shutil.copyfile(file, folder / file.name)
        yield folder / graph.name


def _read(openvino: Any, path: str | os.PathLike[str]) -> Any:
    """Read an ONNX file.

    ``Core.read_model`` would hand a file that is no ONNX graph to its readers of other formats,
    which print to stderr.
    """
    onnx = openvino.frontend.FrontEndManager().load_by_framework("onnx")
    return onnx.convert(onnx.load(os.fspath(path)))


def _described(
    ports: Any, tensors: Sequence[TensorSpec]
) -> dict[str, tuple[str, Sequence[int | str | None]]]:
    """Return name -> dtype and shape; a tensor of several names gets that of the spec."""
    names = {tensor.name for tensor in tensors}
    return {
        next(iter(sorted(port.names & names)), port.any_name): (
            np.dtype(port.element_type.to_dtype()).name,
            [axis.get_length() if axis.is_static else None for axis in port.partial_shape],
        )
        for port in ports
    }


def _reason(error: BaseException) -> str:
    """Return the last line of an error: the others name OpenVINO's source files."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next(filter(None, reversed(lines)), first_line(error))
