"""Where TensorRT 10.3 to 11.x and TensorRT-RTX differ at run time: all of it is in this file.

The calls of ``tensorrt.py`` itself have one name and one meaning in all of them.
"""

from __future__ import annotations

from typing import Any

from tap_deploy.errors import MissingDependencyError, first_line
from tap_deploy.optional_modules import load_module
from tap_deploy.sessions.trt.runtime_cache import RuntimeCacheFile

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt_rtx"
INSTALL = {
    TENSORRT: (
        'JetPack brings it (apt install python3-libnvinfer); elsewhere: pip install "tap-deploy'
        '[tensorrt]"'
    ),
    TENSORRT_RTX: 'install it with: pip install "tap-deploy[rtx]"',
}


def import_tensorrt(backend: str) -> Any:
    """Import the module of a backend.

    Raises:
        MissingDependencyError: it is not installed, or broken.
    """
    try:
        return load_module(backend)
    except ImportError as exc:
        raise MissingDependencyError(
            f"backend {backend!r} cannot be loaded ({first_line(exc)}); {INSTALL[backend]}"
        ) from exc


class ContextFactory:
    """Makes execution contexts whose scratch memory is ours.

    TensorRT takes the allocation strategy itself. TensorRT-RTX compiles for the GPU at run
    time: it takes a runtime configuration, which carries the cache of what it compiled.
    """

    def __init__(
        self, trt: Any, engine: Any, cache_file: RuntimeCacheFile | None, *, recorded: bool
    ) -> None:
        """Prepare.

        Args:
            trt: the module.
            engine: deserialised.
            cache_file: where TensorRT-RTX keeps what it compiles; None for TensorRT.
            recorded: runs become CUDA graphs. By default, TensorRT-RTX compiles kernels for a
                shape in the background and runs slower ones meanwhile; those would stay in the
                recordings for good. So it compiles before the first run with a shape.
        """
        self._engine = engine
        self._strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._config: Any = None
        self._cache: Any = None
        self._file = cache_file
        if cache_file is not None:
            self._config = engine.create_runtime_config()
            self._config.set_execution_context_allocation_strategy(self._strategy)
            if recorded:
                eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
                self._config.dynamic_shapes_kernel_specialization_strategy = eager
            self._cache = self._config.create_runtime_cache()
            stored = cache_file.read()
            if stored is not None:
                # False: made by another version or for another GPU; it begins empty then.
                self._cache.deserialize(stored)
            self._config.set_runtime_cache(self._cache)

    def create(self) -> Any:
        """Return a new execution context, or None if TensorRT refuses."""
        if self._config is None:
            return self._engine.create_execution_context(self._strategy)
        return self._engine.create_execution_context(self._config)

    def can_capture(self, context: Any, stream: int) -> bool:
        """Whether a run in this state can become part of a CUDA graph.

        Only TensorRT-RTX can be asked: it may have to compile first. TensorRT is tried.
        """
        return self._config is None or bool(context.is_stream_capturable(stream))

    def close(self) -> None:
        """Store the cache and let go of the engine."""
        if self._cache is not None and self._file is not None:
            serialized = self._cache.serialize()
            if serialized is not None:
                self._file.write(bytes(serialized))
        self._cache = self._config = self._engine = None
