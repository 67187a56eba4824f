"""Loads the graphs of a bundle as sessions or as a pipeline."""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tap_deploy import graphs
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.variant import Variant, variant_specs
from tap_deploy.errors import SessionError
from tap_deploy.graphs import GraphSpec
from tap_deploy.machine.cpu import cpu_has_bf16, cpu_name
from tap_deploy.machine.host import Host
from tap_deploy.machine.memory import return_freed_memory
from tap_deploy.sessions.cache_folder import default_cache_folder
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.cpu_choice import cpu_backends
from tap_deploy.sessions.gpu.graph import DeviceGraph
from tap_deploy.sessions.gpu.memory import DeviceMemory
from tap_deploy.sessions.gpu.open_memory import open_device_memory
from tap_deploy.sessions.host_pipeline import HostPipeline
from tap_deploy.sessions.lazy_session import LazySession
from tap_deploy.sessions.options import DeviceOptions
from tap_deploy.sessions.ort.providers import CUDA as CUDA_PROVIDER
from tap_deploy.sessions.ort.providers import Provider
from tap_deploy.sessions.pipeline import Pipeline
from tap_deploy.sessions.run_on import FASTEST_ON_CPU, ONNXRUNTIME, RunOn
from tap_deploy.sessions.trt.runtime_cache import RuntimeCacheFile
from tap_deploy.sessions.verified import check_verified

logger = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loader:
    """Loads the graphs of a bundle; callers check verdicts and self-tests of ONNX files.

    Attributes:
        bundle: the bundle.
        run_on: backend, precision and device.
    """

    bundle: Bundle
    run_on: RunOn

    @property
    def _specs(self) -> dict[str, GraphSpec]:
        return variant_specs(self.bundle.config, self.run_on.variant)

    @functools.cached_property
    def _onnx(self) -> Variant:
        """The ONNX files, for onnxruntime only, so that a missing engine is reported as one."""
        return self.bundle.variant(self.run_on.variant)

    def sessions(self, options: DeviceOptions) -> dict[str, Session]:
        """Load the graphs as sessions on host arrays, by graph name."""
        sessions: dict[str, Session] = {}
        try:
            for name, spec in self._specs.items():
                sessions[name] = self._session(spec, options)
        except BaseException:
            for session in sessions.values():
                session.close()
            raise
        return sessions

    def host_pipeline(self) -> Pipeline:
        """Load the graphs on the CPU, in parallel; the text decoder at the first caption.

        Calls without captions never load the text decoder. ``Bundle.open`` has checked its files;
        if they were touched since, they are checked again before they are loaded.
        """
        options, specs, _ = DeviceOptions(), self._specs, self._onnx
        _ = self._cpu_backends  # chosen once, before the threads start

        def load_text_decoder() -> Session:
            session = self._session(specs[graphs.TEXT_DECODER], options)
            return_freed_memory()
            return session

        first = (graphs.IMAGE_ENCODER, graphs.PROMPT_DECODER)
        with ThreadPoolExecutor(len(first)) as threads:
            loading = {name: threads.submit(self._session, specs[name], options) for name in first}
        sessions = {name: future.result() for name, future in loading.items()}
        return_freed_memory()  # what held the files while they were parsed
        text_decoder = LazySession(specs[graphs.TEXT_DECODER], load_text_decoder)
        return HostPipeline({**sessions, graphs.TEXT_DECODER: text_decoder}, self.bundle.config)

    def pipeline(self, options: DeviceOptions) -> Pipeline:
        """Load the graphs as a pipeline that keeps intermediate tensors on the GPU."""
        from tap_deploy.sessions.gpu.pipeline import DevicePipeline

        if not self.run_on.is_engine:
            self._provider(options).forbid_tf32()
        memory = open_device_memory(self.run_on.resolved_device.index)
        return DevicePipeline(
            memory,
            functools.partial(self._graph, memory, options),
            self._specs,
            self.bundle.config,
            options,
        )

    def _session(self, spec: GraphSpec, options: DeviceOptions) -> Session:
        if not self.run_on.is_engine:
            load = self._cpu_session if self.run_on.on_cpu else self._provider_session
            return self._checked(spec, functools.partial(load, spec, options))
        from tap_deploy.sessions.gpu.session import DeviceSession

        memory = open_device_memory(self.run_on.resolved_device.index)
        graph = functools.partial(self._graph, memory, options, spec)
        return DeviceSession(memory, graph)

    def _checked(self, spec: GraphSpec, load: Callable[[], Loaded]) -> Loaded:
        """Load the ONNX file of a graph, see ``Bundle.loaded``."""
        return self.bundle.loaded(self._onnx.records[spec.name].files, load)

    def _provider_session(self, spec: GraphSpec, options: DeviceOptions) -> Session:
        from tap_deploy.sessions.ort.session import OnnxRuntimeSession

        provider = self._provider(options)
        provider.forbid_tf32()
        return OnnxRuntimeSession(self._onnx.path(spec.name), spec, provider=provider)

    def _cpu_session(self, spec: GraphSpec, options: DeviceOptions) -> Session:
        if self.run_on.in_bf16 and not cpu_has_bf16(Host()):
            raise SessionError(
                f"this CPU ({cpu_name(Host())}) cannot multiply bf16; use precision fp32 or int8"
            )
        path, threads = self._onnx.path(spec.name), self.run_on.threads
        if self._cpu_backends[spec.name] == ONNXRUNTIME:
            from tap_deploy.sessions.ort.session import OnnxRuntimeSession

            return OnnxRuntimeSession(path, spec, threads=threads)
        from tap_deploy.sessions.openvino.compiled_cache import CompiledCache
        from tap_deploy.sessions.openvino.session import OpenVinoSession

        folder, digests = self._cache_folder(options), self._onnx.digests(spec.name)
        unchanged = functools.partial(self.bundle.is_unchanged, self._onnx.records[spec.name].files)
        return OpenVinoSession(
            path,
            spec,
            threads=threads,
            bf16=self.run_on.computes_in_bf16(spec.name),
            cache=None if folder is None else CompiledCache(folder, digests, unchanged),
        )

    @functools.cached_property
    def _cpu_backends(self) -> Mapping[str, str]:
        """Graph name -> backend that runs it on the CPU."""
        chosen = cpu_backends(self.bundle.config, self.run_on)
        if self.run_on.backend == FASTEST_ON_CPU:
            logger.info("on this CPU: %s", ", ".join(f"{g} in {b}" for g, b in chosen.items()))
        return chosen

    def _graph(self, memory: DeviceMemory, options: DeviceOptions, spec: GraphSpec) -> DeviceGraph:
        if not self.run_on.is_engine:
            return self._onnxruntime_graph(options, spec)
        return self._engine(memory, options, spec)

    def _onnxruntime_graph(self, options: DeviceOptions, spec: GraphSpec) -> DeviceGraph:
        from tap_deploy.sessions.ort.graph import OnnxRuntimeGraph

        provider = self._provider(options)
        path = self._onnx.path(spec.name)
        # CUDA graphs need fixed shapes; those of the other graphs change between calls.
        record = options.cuda_graphs and spec.name == graphs.TEXT_DECODER
        limits = dict(provider.limits) | {"B": 1}
        provider = dataclasses.replace(provider, limits=limits, record=record)
        return OnnxRuntimeGraph(path, spec, provider, functools.partial(self._checked, spec))

    def _provider(self, options: DeviceOptions) -> Provider:
        config, index = self.bundle.config, self.run_on.resolved_device.index
        provider = Provider.from_name(self.run_on.provider, index)
        cache = None if provider.name == CUDA_PROVIDER else self._cache_folder(options)
        return dataclasses.replace(
            provider,
            limits={
                "P": options.max_prompts,
                "N": options.max_points,
                "M": config.num_mask_tokens,
                "Q": options.max_prompts,
                "T": config.text_seq_len,
                "K": graphs.draw_candidates(config),
            },
            cache_folder=cache and cache / "onnxruntime-tensorrt",
            tf32=options.tf32,
        )

    def _cache_folder(self, options: DeviceOptions) -> pathlib.Path | None:
        return default_cache_folder() if options.cache_folder is None else options.cache_folder

    def _engine(self, memory: DeviceMemory, options: DeviceOptions, spec: GraphSpec) -> DeviceGraph:
        from tap_deploy.bundle.plans import load_plan, plans_verified_on
        from tap_deploy.sessions.trt.engine import TensorRtEngine
        from tap_deploy.sessions.trt.versions import TENSORRT_RTX, import_tensorrt

        trt = import_tensorrt(self.run_on.backend)
        loaded = load_plan(
            self.bundle,
            backend=self.run_on.backend,
            backend_version=trt.__version__,
            compute_capability=memory.compute_capability,
            variant=self.run_on.variant,
            graph=spec.name,
            allow_failed_selftest=self.run_on.allow_failed,
        )
        if not self.run_on.allow_failed:
            plans = loaded.path.parent
            subject = f"the engine in {plans}"
            check_verified(plans_verified_on(plans), self.run_on, subject, str(self.bundle.path))
        cache = None
        if self.run_on.backend == TENSORRT_RTX:
            folder = self._cache_folder(options)
            cache = RuntimeCacheFile(folder, loaded.plan, trt.__version__)
        host_code = loaded.record.version_compatible
        return TensorRtEngine(trt, loaded.plan, spec, cache_file=cache, host_code=host_code)
