"""A strict fake of ``tensorrt``, one module object per version: touching what it lacks raises.

``strict_module("10.3")`` has the classes, enumerations and attributes that
``tests/data/trt_api/tensorrt-10.3.json`` lists for that version, and nothing else. A name that the
version lacks raises AttributeError with the name, as the real module does; a name that it has, but
that nobody has implemented here, raises NotImplementedError, so that no test passes by accident.
Setting an attribute that a native class lacks raises, too. Enumerators have their real names and,
except for the few in ``REAL_VALUES``, made-up values: code must take numbers from the enumerations.

This file is the builder's side. Other sides are added by passing implementations::

    trt = strict_module("10.3", Runtime=FakeRuntime, ICudaEngine=FakeEngine)

where ``FakeRuntime`` derives from ``Strict`` and may implement the methods of every version: the
JSON decides which of them can be seen. In its methods, ``self._trt`` is the module;
``self._trt.IHostMemory._make(...)`` makes an object of a class that has no constructor in Python.
A subclass that a program writes (of ``ILogger``, ``IProgressMonitor``, …) may have any attributes.

A plan of the fake, made to be run by a fake runtime, is::

    PLAN_MAGIC                                 b"STRICT-TENSORRT-PLAN\n"
    8 bytes, little-endian                     length of the header
    the header, JSON in UTF-8                  see ``PlanHeader``
    the ONNX file, byte for byte               external data stays at ``onnx_path``

``read_plan(bytes) -> (PlanHeader, onnx_bytes)`` reads it back, and raises ValueError for anything
else. As with the real thing, ``PlanHeader.fake`` is the version that made it.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import pathlib
import re
import secrets
import struct
import types
import weakref
from typing import Any

API_FOLDER = pathlib.Path(__file__).parent / "data" / "trt_api"
VERSIONS = ("10.3", "10.13", "10.16", "11.1")
PLAN_MAGIC = b"STRICT-TENSORRT-PLAN\n"
CACHE_MAGIC = b"STRICT-TIMING-CACHE "
# Newest opset that the parser of a version reads; documented for 10.15 and 11, cautious for 10.3.
OPSETS = {"10.3": 20, "10.13": 23, "10.16": 24, "11.1": 25, "1.7": 25}
WEAK_TYPING_FLAGS = {"FP16", "BF16", "INT8", "FP8", "INT4", "FP4"}

_SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
# Part of every version, but not of the JSON: nested in another class, or defined in Python.
ADDED_NAMES = {
    "<module>": {"__version__"},
    "ILogger": {"log", "Severity", *_SEVERITIES},
    "Logger": {"log", "Severity", *_SEVERITIES},
}
# Enumerators with documented numbers or a documented order.
REAL_VALUES = {
    "10": {"NetworkDefinitionCreationFlag": {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}},
    "11": {"NetworkDefinitionCreationFlag": {"STRONGLY_TYPED": 0}},
    "1": {"NetworkDefinitionCreationFlag": {"STRONGLY_TYPED": 0}},
}
_NOT_ENUMERATIONS = {"Dims"}
_ENUM_PROPERTIES = {"name", "value", "itemsize"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanHeader:
    """What the fake's builder was asked for.

    ``profiles``: per optimization profile, input name -> [min, opt, max] shapes. ``inputs`` and
    ``outputs``: ``{"name", "dtype" (NumPy name), "shape" (-1 = dynamic)}`` in the graph's order.
    """

    fake: str
    backend: str
    onnx_path: str
    onnx_sha256: str
    profiles: list[dict[str, list[list[int]]]]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    strongly_typed: bool
    flags: list[str]
    hardware_compatibility_level: str
    compute_capabilities: list[str]
    builder_optimization_level: int
    profiling_verbosity: str
    memory_pools: dict[str, int]
    timing_cache_entries: int | None


def read_plan(plan: bytes) -> tuple[PlanHeader, bytes]:
    """Return header and ONNX bytes of a plan of the fake; ValueError if it is none."""
    if not plan.startswith(PLAN_MAGIC):
        raise ValueError("not a plan of the strict fake")
    start = len(PLAN_MAGIC) + 8
    (length,) = struct.unpack("<Q", plan[len(PLAN_MAGIC) : start])
    header = PlanHeader(**json.loads(plan[start : start + length]))
    onnx_bytes = plan[start + length :]
    if hashlib.sha256(onnx_bytes).hexdigest() != header.onnx_sha256:
        raise ValueError("the plan was damaged")
    return header, onnx_bytes


class NativeEnum(enum.Enum):
    """Like an enumeration of pybind11: an ``int`` on request only, and not ordered."""

    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__


class Severity(NativeEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __le__(self, other: Severity) -> bool:
        return int(self) <= int(other)

    def __lt__(self, other: Severity) -> bool:
        return int(self) < int(other)


class StrictType(type):
    """Checks the attributes of a class against the list of the version."""

    def __getattribute__(cls, name: str) -> Any:
        if not name.startswith("_") and "_names" in type.__getattribute__(cls, "__dict__"):
            cls._check(name)
            if not hasattr(type, name) and not any(name in c.__dict__ for c in cls.__mro__):
                raise NotImplementedError(f"the fake does not implement {cls.__name__}.{name}")
        return type.__getattribute__(cls, name)

    def _check(cls, name: str) -> None:
        if name not in cls._names:
            raise AttributeError(f"{cls._label} has no attribute {cls.__name__}.{name}")


class Strict(metaclass=StrictType):
    """Base of every implementation; see the top of this file."""

    _trt: Any
    _label: str
    _names: frozenset[str]

    @classmethod
    def _make(cls, **state: Any) -> Any:
        made = object.__new__(cls)
        made.__dict__.update(state)
        return made

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and "_names" in type(self).__dict__:
            type(self)._check(name)
            getattr(type(self), name)
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and "_names" in type(self).__dict__:
            type(self)._check(name)
            getattr(type(self), name)
        object.__setattr__(self, name, value)


class _Unconstructible(Strict):
    def __init__(self, *args: Any) -> None:
        raise TypeError(f"{type(self).__name__}: No constructor defined!")


class _Unimplemented(Strict):
    def __init__(self, *args: Any) -> None:
        raise NotImplementedError(f"the fake does not implement {type(self).__name__}")


class ILogger(Strict):
    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError("ILogger.log is to be overridden")


class Logger(ILogger):
    def __init__(self, min_severity: Severity = Severity.WARNING) -> None:
        self._min_severity = min_severity

    min_severity = property(lambda self: self._min_severity)

    def log(self, severity: Severity, msg: str) -> None:
        """Ignore the message; the real logger prints it."""


class IProgressMonitor(Strict):
    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...
    def step_complete(self, phase_name: str, step: int) -> bool: ...
    def phase_finish(self, phase_name: str) -> None: ...


class IHostMemory(_Unconstructible):
    """The real one has the buffer protocol; here, ``bytes(memory)`` is all there is."""

    _data: bytes
    nbytes = property(lambda self: len(self._data))

    def __bytes__(self) -> bytes:
        return self._data


class ITensor(_Unconstructible):
    name = property(lambda self: self._name)
    dtype = property(lambda self: self._dtype)
    shape = property(lambda self: self._shape)


class INetworkDefinition(_Unconstructible):
    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._outputs))
    num_layers = property(lambda self: self._num_layers)

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def get_output(self, index: int) -> Any:
        return self._outputs[index]

    def get_flag(self, flag: NativeEnum) -> bool:
        assert isinstance(flag, self._trt.NetworkDefinitionCreationFlag)
        return bool(self._flags >> int(flag) & 1)


class ParserError(_Unconstructible):
    def desc(self) -> str:
        return str(self._desc)

    def node_name(self) -> str:
        return ""


class OnnxParser(Strict):
    """Reads the model with ``onnx``; knows the opsets of its version."""

    def __init__(self, network: Any, logger: Any) -> None:
        assert isinstance(network, self._trt.INetworkDefinition)
        assert isinstance(logger, self._trt.ILogger)
        self._network, self._errors = network, []
        self._trt._building.add(self)

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    def clear_errors(self) -> None:
        self._errors.clear()

    def parse_from_file(self, model: str) -> bool:
        import onnx

        assert isinstance(model, str), "the binding takes no Path"
        path = pathlib.Path(model)
        try:
            data = path.read_bytes()
            proto = onnx.load_model_from_string(data)
        except OSError as exc:
            return self._refuse(f"cannot open {model}: {exc.strerror}")
        except Exception:
            return True  # like the real one: an invalid protobuf gives an empty network
        opset = max((o.version for o in proto.opset_import if not o.domain), default=0)
        if opset > OPSETS[self._trt._version]:
            return self._refuse(f"unsupported ONNX opset {opset}")
        graph, weights = proto.graph, {i.name for i in proto.graph.initializer}
        network = self._network
        network._inputs = [self._tensor(v) for v in graph.input if v.name not in weights]
        network._outputs = [self._tensor(v) for v in graph.output]
        network._num_layers = len(graph.node)
        network._path, network._onnx = path, data
        return True

    def _refuse(self, reason: str) -> bool:
        self._errors.append(self._trt.ParserError._make(_desc=reason))
        return False

    def _tensor(self, value: Any) -> Any:
        import onnx

        kind = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        names = {"float32": "FLOAT", "float16": "HALF"}
        native = getattr(self._trt.DataType, names.get(dtype, dtype.upper()))
        made = self._trt.ITensor._make(_name=value.name, _dtype=native, _shape=shape, _np=dtype)
        return made


class IOptimizationProfile(_Unconstructible):
    _shapes: dict[str, list[list[int]]]

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._shapes[input] = [list(min), list(opt), list(max)]

    def get_shape(self, input: str) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._shapes[input]]

    def __bool__(self) -> bool:
        return all(
            lo <= mid <= hi
            for shapes in self._shapes.values()
            for lo, mid, hi in zip(*shapes, strict=True)
        )


class ITimingCache(_Unconstructible):
    _entries: frozenset[str]
    _version: str

    def serialize(self) -> Any:
        values = {"version": self._version, "entries": sorted(self._entries)}
        return self._trt.IHostMemory._make(_data=CACHE_MAGIC + json.dumps(values).encode())

    def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
        assert isinstance(input_cache, ITimingCache)
        if input_cache._version != self._version and not ignore_mismatch:
            return False
        self._entries |= input_cache._entries
        return True


def _setting(name: str, kind: str | type) -> property:
    """A property of the config that takes one type only."""

    def check(self: Any, value: Any) -> None:
        wanted = getattr(self._trt, kind) if isinstance(kind, str) else kind
        if value is not None and (not isinstance(value, wanted) or isinstance(value, bool)):
            raise TypeError(f"{name} takes {kind}, not {value!r}")
        self._settings[name] = value

    return property(lambda self: self._settings[name], check)


class IBuilderConfig(_Unconstructible):
    builder_optimization_level = _setting("builder_optimization_level", int)
    hardware_compatibility_level = _setting(
        "hardware_compatibility_level", "HardwareCompatibilityLevel"
    )
    profiling_verbosity = _setting("profiling_verbosity", "ProfilingVerbosity")
    progress_monitor = _setting("progress_monitor", "IProgressMonitor")
    num_compute_capabilities = _setting("num_compute_capabilities", int)
    num_optimization_profiles = property(lambda self: len(self._profiles))

    def set_flag(self, flag: NativeEnum) -> None:
        assert isinstance(flag, self._trt.BuilderFlag)
        self._flags.add(flag.name)

    def clear_flag(self, flag: NativeEnum) -> None:
        assert isinstance(flag, self._trt.BuilderFlag)
        self._flags.discard(flag.name)

    def get_flag(self, flag: NativeEnum) -> bool:
        assert isinstance(flag, self._trt.BuilderFlag)
        return flag.name in self._flags

    def set_memory_pool_limit(self, pool: NativeEnum, pool_size: int) -> None:
        assert isinstance(pool, self._trt.MemoryPoolType)
        assert isinstance(pool_size, int)
        self._pools[pool.name] = pool_size

    def get_memory_pool_limit(self, pool: NativeEnum) -> int:
        return int(self._pools.get(pool.name, 0))

    def add_optimization_profile(self, profile: Any) -> int:
        assert isinstance(profile, self._trt.IOptimizationProfile)
        if not profile:
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def set_compute_capability(self, compute_capability: NativeEnum, index: int) -> bool:
        assert isinstance(compute_capability, self._trt.ComputeCapability)
        if not 0 <= index < self._settings["num_compute_capabilities"]:
            return False
        self._capabilities[index] = compute_capability.name
        return True

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        data = bytes(serialized_timing_cache)
        if not data:
            entries: frozenset[str] = frozenset()
            return self._trt.ITimingCache._make(_entries=entries, _version=self._trt._version)
        if not data.startswith(CACHE_MAGIC):
            return None
        values = json.loads(data[len(CACHE_MAGIC) :])
        entries = frozenset(values["entries"])
        return self._trt.ITimingCache._make(_entries=entries, _version=values["version"])

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert isinstance(cache, self._trt.ITimingCache)
        if cache._version != self._trt._version and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache


class Builder(Strict):
    """Builds a plan of the layout above; rejects what the real builder is known to reject."""

    def __init__(self, logger: Any) -> None:
        assert isinstance(logger, self._trt.ILogger)
        self._logger = logger
        self._trt._building.add(self)

    def create_network(self, flags: int = 0) -> Any:
        assert isinstance(flags, int)
        network = self._trt.INetworkDefinition._make(
            _flags=flags, _inputs=[], _outputs=[], _num_layers=0, _path=None, _onnx=b""
        )
        self._trt._building.add(network)
        return network

    def create_builder_config(self) -> Any:
        trt = self._trt
        settings = {
            "builder_optimization_level": 3,
            "hardware_compatibility_level": trt.HardwareCompatibilityLevel.NONE,
            "profiling_verbosity": trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
            "progress_monitor": None,
            "num_compute_capabilities": 0,
        }
        return trt.IBuilderConfig._make(
            _settings=settings,
            _flags={"TF32"},
            _pools={},
            _profiles=[],
            _capabilities={},
            _cache=None,
        )

    def create_optimization_profile(self) -> Any:
        return self._trt.IOptimizationProfile._make(_shapes={})

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        assert isinstance(network, self._trt.INetworkDefinition)
        assert isinstance(config, self._trt.IBuilderConfig)
        problem = self._problem(network, config)
        if problem is None and not self._report_progress(config):
            problem = "the build was cancelled"
        if problem is not None:
            self._logger.log(self._trt.ILogger.ERROR, problem)
            return None
        if config._cache is not None:
            new = {secrets.token_hex(8) for _ in range(network.num_layers)}
            config._cache._entries |= new
        header = json.dumps(dataclasses.asdict(self._header(network, config))).encode()
        length = struct.pack("<Q", len(header))
        data = PLAN_MAGIC + length + header + network._onnx
        return self._trt.IHostMemory._make(_data=data)

    def _problem(self, network: Any, config: Any) -> str | None:
        if not network._outputs:
            return "network has no outputs"
        typed = network.get_flag(self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        if typed and WEAK_TYPING_FLAGS & config._flags:
            return f"{WEAK_TYPING_FLAGS & config._flags} set for a strongly typed network"
        if len(config._capabilities) != config._settings["num_compute_capabilities"]:
            return "a compute capability was announced and not set"
        for tensor in network._inputs:
            if -1 in tensor._shape:
                for profile in config._profiles or [None]:
                    shapes = profile._shapes.get(tensor._name) if profile is not None else None
                    if shapes is None or not all(_fits(s, tensor._shape) for s in shapes):
                        return f"no optimization profile for {tensor._name} {tensor._shape}"
        return None

    def _report_progress(self, config: Any) -> bool:
        monitor, phase, steps = config._settings["progress_monitor"], "Building Engine", 3
        if monitor is None:
            return True
        monitor.phase_start(phase, None, steps)
        going = all(monitor.step_complete(phase, step) for step in range(steps))
        monitor.phase_finish(phase)
        return going

    def _header(self, network: Any, config: Any) -> PlanHeader:
        settings, trt = config._settings, self._trt
        return PlanHeader(
            fake=trt._version,
            backend=trt.__name__,
            onnx_path=str(network._path),
            onnx_sha256=hashlib.sha256(network._onnx).hexdigest(),
            profiles=[p._shapes for p in config._profiles],
            inputs=[_described(t) for t in network._inputs],
            outputs=[_described(t) for t in network._outputs],
            strongly_typed=network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
            flags=sorted(config._flags),
            hardware_compatibility_level=settings["hardware_compatibility_level"].name,
            compute_capabilities=[config._capabilities[i] for i in sorted(config._capabilities)],
            builder_optimization_level=settings["builder_optimization_level"],
            profiling_verbosity=settings["profiling_verbosity"].name,
            memory_pools=dict(config._pools),
            timing_cache_entries=None if config._cache is None else len(config._cache._entries),
        )


def _fits(shape: list[int], pattern: tuple[int, ...]) -> bool:
    return len(shape) == len(pattern) and all(
        size >= 1 and wanted in (-1, size) for size, wanted in zip(shape, pattern, strict=True)
    )


def _described(tensor: Any) -> dict[str, Any]:
    return {"name": tensor._name, "dtype": tensor._np, "shape": list(tensor._shape)}


BUILDER_SIDE: dict[str, type[Strict]] = {
    c.__name__: c
    for c in (
        ILogger,
        Logger,
        IProgressMonitor,
        IHostMemory,
        ITensor,
        INetworkDefinition,
        ParserError,
        OnnxParser,
        IOptimizationProfile,
        ITimingCache,
        IBuilderConfig,
        Builder,
    )
}


class _StrictModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.__name__} {self._version} has no attribute {name}")


@functools.cache
def _api(backend: str, version: str) -> dict[str, list[str]]:
    loaded: dict[str, list[str]] = json.loads(
        (API_FOLDER / f"{backend}-{version}.json").read_text("utf-8")
    )
    return loaded


def strict_module(version: str, backend: str = "tensorrt", **implementations: Any) -> Any:
    """Make a module for a version; install it with ``monkeypatch.setitem(sys.modules, …)``.

    Args:
        version: one of ``VERSIONS``; "1.7" for the backend "tensorrt_rtx".
        backend: name of the module: "tensorrt" or "tensorrt_rtx".
        implementations: class name -> class derived from ``Strict``, or module function name ->
            function; besides, or in place of, ``BUILDER_SIDE``.
    """
    module = _StrictModule(backend)
    module.__version__, module._version = f"{version}.0.1", version
    module._building = weakref.WeakSet()  # live builders, networks and parsers
    label = f"{backend} {version}"
    chosen = BUILDER_SIDE | implementations
    for name, members in _api(backend, version).items():
        if name == "<module>":
            for function in members:
                setattr(module, function, chosen.get(function, _missing(label, function)))
        elif _is_enumeration(name, members):
            setattr(module, name, _enumeration(name, members, version))
        else:
            values = {"_names": frozenset(members) | ADDED_NAMES.get(name, set())}
            values |= {"_label": label, "_trt": module, "__module__": backend}
            base = chosen.get(name, _Unimplemented)
            setattr(module, name, StrictType(name, (base,), values))
    _derive_logger(module)
    return module


def _derive_logger(module: Any) -> None:
    """``Logger`` is an ``ILogger`` in every version."""
    logger = module.Logger
    own = {k: logger.__dict__[k] for k in ("_names", "_label", "_trt", "__module__")}
    bases = (*logger.__bases__, module.ILogger)
    module.Logger = StrictType("Logger", bases, own)


def _is_enumeration(name: str, members: list[str]) -> bool:
    others = {m for m in members if not m.startswith("_")} - _ENUM_PROPERTIES
    upper = all(re.fullmatch("[A-Z][A-Z0-9_]*", member) for member in others)
    return bool(others) and upper and name not in _NOT_ENUMERATIONS


def _enumeration(name: str, members: list[str], version: str) -> type[NativeEnum]:
    names = sorted({m for m in members if not m.startswith("_")} - _ENUM_PROPERTIES)
    known = REAL_VALUES[version.split(".")[0]].get(name, {})
    free = iter(n for n in range(len(names) * 2 + 2) if n not in known.values())
    values = {member: known[member] if member in known else next(free) for member in names}
    return NativeEnum(name, values)  # type: ignore[return-value]


def _missing(label: str, name: str) -> Any:
    def function(*args: Any) -> Any:
        raise NotImplementedError(f"the fake of {label} does not implement {name}()")

    return function
