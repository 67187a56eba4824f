"""Which backend runs which graph on this CPU, for the backend ``cpu``."""

from __future__ import annotations

import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from tap_deploy import graphs
from tap_deploy.config import TapConfig
from tap_deploy.errors import MissingDependencyError
from tap_deploy.machine.cpu import cpu_flags, cpu_name
from tap_deploy.machine.host import Host
from tap_deploy.precisions import FP32, GRAPHS_IN_BF16, INT8
from tap_deploy.sessions.cache_folder import default_cache_folder
from tap_deploy.sessions.openvino.session import import_openvino
from tap_deploy.sessions.ort.session import import_onnxruntime
from tap_deploy.sessions.run_on import FASTEST_ON_CPU, ONNXRUNTIME, OPENVINO, RunOn
from tap_deploy.storage.files import atomic_file, new_folder
from tap_deploy.storage.json_files import read_json

logger = logging.getLogger(__name__)

# Precision, fp32 or int8 -> graph -> backend -> time, in any unit.
Times = Mapping[str, Mapping[str, Mapping[str, float]]]

_IMPORTS: Mapping[str, Callable[[], Any]] = {
    ONNXRUNTIME: import_onnxruntime,
    OPENVINO: import_openvino,
}

# Measured with tap_vit_b on two cores with AVX512-VNNI, one picture, 16 prompts and 16 captions, as
# shares of the time of onnxruntime in fp32; see docs/runtime.md.
DEFAULT_TIMES: Times = {
    FP32: {
        graphs.IMAGE_ENCODER: {ONNXRUNTIME: 1.0, OPENVINO: 0.91},
        graphs.PROMPT_DECODER: {ONNXRUNTIME: 1.0, OPENVINO: 0.86},
        graphs.TEXT_DECODER: {ONNXRUNTIME: 1.0, OPENVINO: 1.04},
    },
    INT8: {
        graphs.IMAGE_ENCODER: {ONNXRUNTIME: 0.41, OPENVINO: 0.32},
        graphs.PROMPT_DECODER: {ONNXRUNTIME: 0.95, OPENVINO: 0.80},
        graphs.TEXT_DECODER: {ONNXRUNTIME: 0.62, OPENVINO: 0.64},
    },
}


def version(backend: str) -> str:
    """Return the version of ``onnxruntime`` or ``openvino``.

    Raises:
        MissingDependencyError: it is not installed.
    """
    return str(_IMPORTS[backend]().__version__).partition("-")[0]


def installed() -> dict[str, str]:
    """Return the backends that this CPU can use -> their versions.

    Raises:
        MissingDependencyError: there is none.
    """
    versions, problems = {}, []
    for backend in _IMPORTS:
        try:
            versions[backend] = version(backend)
        except MissingDependencyError as exc:
            problems.append(exc)
    if not versions:
        raise problems[0]
    return versions


def cpu_backends(config: TapConfig, run_on: RunOn) -> dict[str, str]:
    """Return graph name -> the backend that runs it on the CPU.

    For the backend ``cpu``, the installed one that was fastest when ``store_times`` kept times for
    this CPU, these versions and this model, or else by ``DEFAULT_TIMES``.

    Args:
        config: sizes of the model.
        run_on: backend and precision.

    Raises:
        MissingDependencyError: no backend is installed, or none for bf16.
    """
    if run_on.backend != FASTEST_ON_CPU:
        return dict.fromkeys(graphs.GRAPH_NAMES, run_on.backend)
    if run_on.in_bf16:
        import_openvino()  # onnxruntime has no bf16
    versions = installed()
    precision = GRAPHS_IN_BF16.get(run_on.precision, run_on.precision)
    times = _stored_times(config, versions).get(precision, DEFAULT_TIMES[precision])
    return {
        graph: OPENVINO
        if run_on.computes_in_bf16(graph)
        else min((time, backend) for backend, time in by_backend.items() if backend in versions)[1]
        for graph, by_backend in times.items()
    }


def store_times(config: TapConfig, times: Times) -> pathlib.Path | None:
    """Keep times of both backends for ``cpu_backends``; other precisions keep theirs.

    Returns:
        The file; None if this user has no home folder.

    Raises:
        InputError: the file cannot be written.
    """
    versions = installed()
    path = _path(config, versions)
    if path is None:
        return None
    with new_folder(path.parent), atomic_file(path) as partial:
        merged = {**_stored_times(config, versions), **times}
        partial.write_text(json.dumps(merged, indent=1) + "\n", "utf-8")
    return path


def _stored_times(config: TapConfig, versions: Mapping[str, str]) -> Times:
    path = _path(config, versions)
    try:
        return {} if path is None else _checked(read_json(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as exc:
        logger.warning("%s cannot be read; the built-in times are used: %s", path, exc)
        return {}


def _checked(values: Any) -> Times:
    """Return the content of the file; raises ValueError, or the like, if it is another."""
    for by_graph in values.values():
        for graph in graphs.GRAPH_NAMES:
            if not all(by_graph[graph][backend] > 0 for backend in _IMPORTS):
                raise ValueError(f"a time of {graph} is not positive")
    return dict(values)


def _path(config: TapConfig, versions: Mapping[str, str]) -> pathlib.Path | None:
    """Return the file of times for this CPU, these versions and a model of these sizes."""
    folder, host = default_cache_folder(), Host()
    parts = (cpu_name(host), sorted(cpu_flags(host)), sorted(versions.items()), config.to_dict())
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    return folder and folder / f"cpu-times-{digest}.json"
