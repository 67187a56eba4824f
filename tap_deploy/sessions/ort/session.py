"""``Session`` on onnxruntime, the default backend, which needs no GPU."""

from __future__ import annotations

import contextlib
import mmap
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from tap_deploy import graphs
from tap_deploy.bundle.manifest import weights_file
from tap_deploy.errors import MissingDependencyError, SessionError, first_line
from tap_deploy.graphs import GraphSpec
from tap_deploy.machine.cpu import NO_VNNI, cpu_int8, usable_cores
from tap_deploy.machine.host import Host
from tap_deploy.optional_modules import load_module
from tap_deploy.sessions.contract import Session, Tensors, check_graph
from tap_deploy.sessions.ort.providers import Provider, require_real_inference

# x86 CPUs without VNNI (AMD before Zen 4, for example) add pairs of int8 products in saturating
# 16-bit arithmetic, so large products give wrong results. This selects a slower, exact kernel, also
# on CPUs with VNNI, whose usual kernel is exact.
EXACT_INT8 = ("session.x64quantprecision", "1")
ERRORS_ONLY = 3  # onnxruntime's log severity
# The GPU does the work; spinning CPU threads would only take cores from other threads.
NO_SPINNING = ("session.intra_op.allow_spinning", "session.inter_op.allow_spinning")

# Otherwise the threads of a session spin for 40 to 70 ms after each run and take the cores from the
# next session: a region of a small model took twice as long.
STOP_SPINNING = ("session.force_spinning_stop", "1")

# Quantizes biases of convolutions in a way that no GPU provider has kernels for; the tensors would
# be copied to the CPU and back.
FOR_CPUS_ONLY = ["WeightBiasQuantization"]
# On CPUs, the fused kernel takes three times as long as Add and LayerNormalization.
SLOW_ON_CPUS = ["SkipLayerNormFusion"]


def import_onnxruntime() -> Any:
    """Import onnxruntime with its telemetry off.

    Raises:
        MissingDependencyError: not installed, or broken.
    """
    try:
        return load_module("onnxruntime")
    except ImportError as exc:
        if isinstance(exc, ModuleNotFoundError) and exc.name == "onnxruntime":
            raise MissingDependencyError(
                "backend 'onnxruntime' is not installed; "
                'install it with: pip install "tap-deploy[onnxruntime]"'
            ) from exc
        raise MissingDependencyError(
            f"backend 'onnxruntime' cannot be loaded: {first_line(exc)}; "
            "tap-export doctor says how to fix it"
        ) from exc


def session_options(runtime: Any, threads: int | None = None) -> Any:
    """Return session options: log errors only, exact int8, and the given number of threads.

    Args:
        runtime: the module onnxruntime.
        threads: number of threads; None for one per core available to this process.
            onnxruntime's own default pins one thread to every core of the machine, including
            those that the process may not use.
    """
    options = runtime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    if cpu_int8(Host()) in (NO_VNNI, None):
        options.add_session_config_entry(*EXACT_INT8)
    options.intra_op_num_threads = usable_cores() if threads is None else threads
    return options


def load_session(
    path: str | os.PathLike[str],
    spec: GraphSpec,
    *,
    threads: int | None = None,
    provider: Provider | None = None,
) -> Any:
    """Load an ONNX file, check it against a spec, and check that the provider runs it.

    Args:
        path: the ONNX file.
        spec: expected inputs and outputs.
        threads: CPU threads per call; None for one per usable core.
        provider: provider that runs the graph; None for the CPU.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        SessionError: the file does not load, does not match the spec, or the provider does not
            run it.
    """
    runtime = import_onnxruntime()
    options = session_options(runtime, threads)
    options.add_session_config_entry(*STOP_SPINNING)
    if provider is None:
        # A plan made in advance keeps the buffers of all sizes for the whole run; with buffers
        # freed after their last use, the encoder needs a sixth of the memory. The text decoder's
        # are small, and its steps are too short for the difference.
        options.enable_mem_pattern = options.enable_mem_reuse = spec.name == graphs.TEXT_DECODER
    else:
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        for entry in NO_SPINNING:
            options.add_session_config_entry(entry, "0")
        return require_real_inference(runtime, path, spec, options, provider, _checked)
    return _checked(runtime, path, spec, options, ["CPUExecutionProvider"])


def _checked(
    runtime: Any, path: str | os.PathLike[str], spec: GraphSpec, options: Any, providers: list[Any]
) -> Any:
    on_cpu = providers == ["CPUExecutionProvider"]
    try:
        with linked_weights(options, path):
            # No fallback: a silent retry on the CPU would hide that the provider failed.
            session = runtime.InferenceSession(
                os.fspath(path),
                options,
                providers=providers,
                enable_fallback=0,
                disabled_optimizers=SLOW_ON_CPUS if on_cpu else FOR_CPUS_ONLY,
            )
    # onnxruntime raises one class per status code, without a common base.
    except Exception as exc:
        raise SessionError(
            f"graph {spec.name}: onnxruntime cannot load {path}: {first_line(exc)}"
        ) from exc
    check_graph(spec, _described(session.get_inputs()), _described(session.get_outputs()))
    return session


@contextlib.contextmanager
def linked_weights(options: Any, path: str | os.PathLike[str]) -> Iterator[None]:
    """Let onnxruntime load a graph and weights that are symlinks into different folders.

    After resolving links, onnxruntime rejects weights outside the graph's folder. Passing the
    weights in memory avoids that check, but copies them, whereas files are mapped.

    Args:
        options: ``onnxruntime.SessionOptions`` of the session that the block creates.
        path: the ONNX file; the bundle has verified it and ``weights_file(path)``.
    """
    graph, data = pathlib.Path(path), pathlib.Path(weights_file(path))
    # onnxruntime 1.23 has neither this method nor the check.
    give = getattr(options, "add_external_initializers_from_files_in_memory", None)
    if give is None or not data.is_file() or data.resolve().parent == graph.resolve().parent:
        yield
        return
    with data.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    give([data.name], [content], [len(content)])
    yield
    content.close()  # not earlier: the options hold its address without a reference


class OnnxRuntimeSession(Session):
    """Runs a graph with onnxruntime on host arrays, on the CPU or a GPU provider.

    IO binding reads and writes the NumPy arrays in place, without copies on the CPU. A GPU provider
    still copies to and from the device; ``OnnxRuntimeGraph`` keeps tensors there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: GraphSpec,
        *,
        threads: int | None = None,
        provider: Provider | None = None,
    ) -> None:
        """Load a graph; arguments and errors as in ``load_session``."""
        super().__init__(spec)
        self._session = load_session(path, spec, threads=threads, provider=provider)
        if provider is not None and provider.has_profile(spec):
            self.limits = provider.limits

    def _run(self, inputs: Tensors, outputs: Tensors) -> None:
        session = self._session  # keeps the session alive if another thread closes it
        if session is None:
            raise self._error("the session is closed; load it again")
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        try:
            session.run_with_iobinding(binding)
        except Exception as exc:
            raise self._error(f"onnxruntime failed: {first_line(exc)}") from exc

    def close(self) -> None:
        """Drop the session and its arena."""
        if not self.is_of_another_process:
            self._session = None


def _described(nodes: Any) -> dict[str, tuple[str, Sequence[int | str | None]]]:
    return {node.name: (_numpy_name(node.type), node.shape) for node in nodes}


def _numpy_name(onnxruntime_type: str) -> str:
    """Convert a type name such as ``tensor(float)`` to a NumPy dtype name."""
    inner = onnxruntime_type.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(inner, inner)
