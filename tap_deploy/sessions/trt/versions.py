"""Runtime differences between TensorRT 10.3 to 11.x and TensorRT-RTX.

``engine.py`` uses only the API that is the same in all of them.
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
        MissingDependencyError: not installed, or broken.
    """
    try:
        return load_module(backend)
    except ImportError as exc:
        raise MissingDependencyError(
            f"backend {backend!r} cannot be loaded ({first_line(exc)}); {INSTALL[backend]}"
        ) from exc


class ContextFactory:
    """Creates execution contexts with user-managed scratch memory.

    TensorRT takes the allocation strategy directly. TensorRT-RTX, which compiles kernels at run
    time, takes a runtime configuration that also carries its kernel cache.
    """

    def __init__(
        self, trt: Any, engine: Any, cache_file: RuntimeCacheFile | None, *, recorded: bool
    ) -> None:
        """Prepare the runtime configuration.

        Args:
            trt: the module, ``tensorrt`` or ``tensorrt_rtx``.
            engine: the deserialised engine.
            cache_file: cache of the kernels that TensorRT-RTX compiles; None for TensorRT.
            recorded: whether runs are recorded as CUDA graphs. By default, TensorRT-RTX compiles
                the kernels of a new shape in the background and uses slower ones meanwhile, which
                a recording would keep forever; with ``recorded`` it compiles before the first run.
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
                # Returns False for a cache of another version or GPU, and starts empty.
                self._cache.deserialize(stored)
            self._config.set_runtime_cache(self._cache)

    def create(self) -> Any:
        """Create an execution context; None if TensorRT fails."""
        if self._config is None:
            return self._engine.create_execution_context(self._strategy)
        return self._engine.create_execution_context(self._config)

    def can_capture(self, context: Any, stream: int) -> bool:
        """Whether a run with the current shapes can be captured as a CUDA graph.

        Only TensorRT-RTX answers this, because it may have to compile first. For TensorRT it is
        always True, and the capture itself may fail.
        """
        return self._config is None or bool(context.is_stream_capturable(stream))

    def close(self) -> None:
        """Store the cache and drop the engine."""
        if self._cache is not None and self._file is not None:
            serialized = self._cache.serialize()
            if serialized is not None:
                self._file.write(bytes(serialized))
        self._cache = self._config = self._engine = None
