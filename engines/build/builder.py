"""Builds a plan from an ONNX graph with TensorRT 10.3 … 11.x or TensorRT-RTX.

``versions`` handles their differences. Networks are strongly typed: the ONNX graph alone determines
the precisions, not builder flags.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import time
from typing import Any

from tap_deploy.bundle.manifest import weights_file
from tap_deploy.bundle.plan_record import PlanRecord
from tap_deploy.engines.build.inspection import layer_precisions
from tap_deploy.engines.build.profiles import Profile, profile_as_json
from tap_deploy.engines.build.progress import OnProgress, progress_monitor
from tap_deploy.engines.build.target import BuildTarget
from tap_deploy.engines.build.versions import (
    built_for,
    configure,
    create_network,
    has_progress_monitor,
    has_user_allocation,
)
from tap_deploy.errors import SessionError
from tap_deploy.machine.gpu import Gpu
from tap_deploy.sessions.trt.log import error_log
from tap_deploy.sessions.trt.versions import import_tensorrt
from tap_deploy.storage.files import atomic_file, sha256_of_file
from tap_deploy.storage.folder_lock import locked_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """A plan with its record.

    Attributes:
        plan: serialized engine.
        record: its metadata.
        notes: messages for the user, such as an unusable timing cache.
    """

    plan: bytes
    record: PlanRecord
    notes: tuple[str, ...]


def engine_from_onnx(
    onnx_path: str | os.PathLike[str],
    target: BuildTarget,
    *,
    profile: Profile,
    gpu: Gpu | None = None,
    on_progress: OnProgress | None = None,
) -> EnginePlan:
    """Build the plan of a graph.

    Args:
        onnx_path: the ONNX file; its stem is the name of the graph. Weights may be in a file next
            to it.
        target: backend, sizes and settings.
        profile: shapes of every input; see ``profiles``.
        gpu: the GPU of this machine, from ``local_gpu``, or None. TensorRT builds on it;
            TensorRT-RTX does not need one.
        on_progress: called with the finished share, 0 to 1, and the phase.

    Raises:
        MissingDependencyError: the backend is not installed.
        SessionError: the backend needs a GPU and there is none, or the parser or builder fails; the
            message has its reason.
        InputError: this version of the backend does not support an option of the target.
    """
    trt = import_tensorrt(target.backend)
    path = pathlib.Path(onnx_path)
    parts = plan_parts(trt, path, target, profile, gpu)
    start = time.perf_counter()
    logger = error_log(trt)
    logger.take()  # discards earlier errors, which are not about this build
    plan, notes = _compiled(trt, logger, path, target, profile, on_progress)
    seconds = time.perf_counter() - start
    record = PlanRecord(
        **parts,
        minimum_compute_capability=built_for(target, gpu)[1],
        version_compatible=target.version_compatible,
        gpu=gpu.name if gpu else None,
        driver=gpu.driver if gpu else None,
        options=tuple(target.options()),
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        size_bytes=len(plan),
        build_seconds=round(seconds, 3),
        layer_precisions=_precisions(trt, logger, plan, parts["compute_capabilities"], gpu),
    )
    return EnginePlan(plan=plan, record=record, notes=notes)


def _compiled(
    trt: Any,
    logger: Any,
    path: pathlib.Path,
    target: BuildTarget,
    profile: Profile,
    on_progress: OnProgress | None,
) -> tuple[bytes, tuple[str, ...]]:
    """Return the plan and notes for the user.

    Builder, parser and network are freed on return, because a small board does not have memory for
    them and for the engine that the inspector deserialises next.
    """
    builder = _builder(trt, logger)
    network = create_network(trt, builder)
    _parse(trt, network, logger, path)
    _check_inputs(network, profile, path)
    config = builder.create_builder_config()
    configure(trt, config, target)
    config.add_optimization_profile(_native_profile(builder, profile))
    notes = _attach_cache(config, target)
    plan = _build(trt, builder, network, config, logger, path, on_progress)
    if target.timing_cache is not None:
        save_timing_cache(config, target.timing_cache)
    return plan, notes


def plan_parts(
    trt: Any, onnx_path: pathlib.Path, target: BuildTarget, profile: Profile, gpu: Gpu | None
) -> dict[str, Any]:
    """Return everything that determines a plan, as fields of ``PlanRecord``, before the build."""
    data = pathlib.Path(weights_file(onnx_path))
    user_allocation = {"user_allocation": True} if has_user_allocation(trt) else {}
    return {
        "graph": onnx_path.stem,
        "backend": target.backend,
        "backend_version": str(trt.__version__),
        "compute_capabilities": built_for(target, gpu)[0],
        "variant": target.variant,
        "onnx_sha256": sha256_of_file(onnx_path),
        "onnx_data_sha256": sha256_of_file(data) if data.is_file() else None,
        "profiles": profile_as_json(profile),
        "flags": {
            "strongly_typed": True,
            "tf32": target.tf32,
            "workspace_bytes": target.workspace_bytes,
            "builder_optimization_level": target.opt_level,
            "version_compatible": target.version_compatible,
            "hardware_compatible": target.hardware_compatible,
            "profiling_verbosity": "detailed",
            **user_allocation,
        },
    }


def _builder(trt: Any, logger: Any) -> Any:
    try:
        return trt.Builder(logger)
    except TypeError as exc:  # the binding got a null pointer: no driver, or too old a driver
        reason = logger.take() or str(exc)
        raise SessionError(
            f"{trt.__name__} {trt.__version__} does not start here: {reason}; "
            "see: tap-export doctor --for tensorrt"
        ) from exc


def _parse(trt: Any, network: Any, logger: Any, path: pathlib.Path) -> None:
    parser = trt.OnnxParser(network, logger)
    # The parser accepts a file that is not a protobuf, and returns an empty network.
    if not parser.parse_from_file(os.fspath(path)) or not network.num_outputs:
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        reason = "; ".join(reasons) or "it is not an ONNX model"
        raise SessionError(
            f"{trt.__name__} {trt.__version__} cannot parse {path}: {reason}; "
            "export the bundle again"
        )


def _check_inputs(network: Any, profile: Profile, path: pathlib.Path) -> None:
    found = {network.get_input(i).name for i in range(network.num_inputs)}
    if found != set(profile):
        raise SessionError(
            f"{path} has the inputs {', '.join(sorted(found))}; "
            f"expected {', '.join(sorted(profile))}; export the bundle again"
        )


def _native_profile(builder: Any, profile: Profile) -> Any:
    native = builder.create_optimization_profile()
    for name, shapes in profile.items():
        native.set_shape(name, shapes.min, shapes.opt, shapes.max)
    return native


def _attach_cache(config: Any, target: BuildTarget) -> tuple[str, ...]:
    if target.timing_cache is None:
        return ()
    problem = attach_timing_cache(config, target.timing_cache)
    return (f"{problem}; it is replaced",) if problem else ()


def _build(
    trt: Any,
    builder: Any,
    network: Any,
    config: Any,
    logger: Any,
    path: pathlib.Path,
    on_progress: OnProgress | None,
) -> bytes:
    monitor = None
    if on_progress is not None and has_progress_monitor(trt, config):
        monitor = config.progress_monitor = progress_monitor(trt, on_progress)
    plan = builder.build_serialized_network(network, config)
    if monitor is not None and monitor.error is not None:
        raise monitor.error
    if plan is None:
        reason = logger.take() or "no reason given"
        raise SessionError(
            f"{trt.__name__} {trt.__version__} cannot build {path}: {reason}; "
            "if the workspace is too small for a layer, raise --workspace or lower --max-prompts; "
            "if the machine ran out of memory, lower both"
        )
    return bytes(plan)


def _precisions(
    trt: Any, logger: Any, plan: bytes, capabilities: tuple[str, ...], gpu: Gpu | None
) -> dict[str, int] | None:
    """Return the layer counts from the inspector; None if this GPU cannot run the plan."""
    if gpu is None or gpu.compute_capability not in capabilities:
        return None
    return layer_precisions(trt, logger, plan)


def attach_timing_cache(config: Any, path: pathlib.Path) -> str | None:
    """Attach the timing cache in a file, or an empty one, to a builder config.

    Returns:
        Why an existing file cannot be used, or None.
    """
    cache, problem = None, None
    if path.is_file():
        cache = config.create_timing_cache(path.read_bytes())
        if cache is None or not config.set_timing_cache(cache, False):
            cache, problem = None, f"timing cache {path} is damaged or of another GPU or version"
    if cache is None:
        config.set_timing_cache(config.create_timing_cache(b""), False)
    return problem


def save_timing_cache(config: Any, path: pathlib.Path) -> None:
    """Write the timing cache of a config atomically, merged with the current content of the file.

    Merging keeps entries that another build has added since ``attach_timing_cache``.

    Raises:
        InputError: the file cannot be written, or another process has locked its folder.
    """
    cache = config.get_timing_cache()
    if cache is None:
        return
    with locked_folder(path.parent):
        found = config.create_timing_cache(path.read_bytes()) if path.is_file() else None
        if found is not None:
            cache.combine(found, False)  # rejects a cache of another GPU or version
        with atomic_file(path) as partial:
            partial.write_bytes(bytes(cache.serialize()))
