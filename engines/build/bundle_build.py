"""Builds the plans of a bundle that are missing or outdated, and stores them in it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.plan_record import PlanRecord, plan_key
from tap_deploy.bundle.plans import ENGINES_FOLDER, cached_record, plan_path_name, save_plan
from tap_deploy.engines.build.builder import engine_from_onnx, plan_parts
from tap_deploy.engines.build.profiles import Profile, optimization_profile
from tap_deploy.engines.build.target import BuildTarget
from tap_deploy.engines.build.versions import built_for
from tap_deploy.engines.estimate.memory import available_memory, build_memory_bytes, check_memory
from tap_deploy.graphs import GRAPH_NAMES, GraphSpec
from tap_deploy.machine.gpu import Gpu, local_gpu
from tap_deploy.sessions.trt.versions import import_tensorrt


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphBuild:
    """A graph to build.

    Attributes:
        graph: name of the graph.
        spec: inputs and outputs.
        onnx_path: the ONNX file.
        profile: shapes of every input.
        weights_bytes: size of the weights, bytes.
        memory_bytes: forecast of the memory that the build needs, bytes.
    """

    graph: str
    spec: GraphSpec
    onnx_path: pathlib.Path
    profile: Profile
    weights_bytes: int
    memory_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuiltPlan:
    """A stored plan.

    Attributes:
        graph: name of the graph.
        path: file of the plan.
        record: its metadata.
        cached: whether it existed before.
        notes: messages for the user.
    """

    graph: str
    path: pathlib.Path
    record: PlanRecord
    cached: bool
    notes: tuple[str, ...]


def graph_builds(
    bundle: Bundle, target: BuildTarget, *, integrated: bool = False
) -> list[GraphBuild]:
    """Return the builds of a bundle, one per graph; needs no backend and no GPU.

    Args:
        bundle: bundle with the graphs.
        target: backend, sizes and settings.
        integrated: whether CPU and GPU share memory, as on Jetson.

    Raises:
        BundleError: the bundle does not contain the precision.
    """
    variant, builds = bundle.variant(target.variant), []
    workspace = target.workspace_bytes if integrated else 0
    for graph in GRAPH_NAMES:
        weights = variant.records[graph].weights_bytes
        builds.append(
            GraphBuild(
                graph=graph,
                spec=variant.specs[graph],
                onnx_path=variant.path(graph),
                profile=optimization_profile(variant.specs[graph], target, bundle.config),
                weights_bytes=weights,
                memory_bytes=build_memory_bytes(weights, workspace_bytes=workspace),
            )
        )
    return builds


def build_engines(
    bundle: Bundle,
    target: BuildTarget,
    *,
    force: bool = False,
    force_memory: bool = False,
    on_progress: Callable[[str, float, str], None] | None = None,
    find_gpu: Callable[[], Gpu | None] = local_gpu,
    available_bytes: Callable[[], int | None] = available_memory,
) -> Iterator[BuiltPlan]:
    """Build the plans of a bundle one by one, and yield each once it is stored.

    Args:
        bundle: bundle with the graphs; plans are stored below its ``engines/``.
        target: backend, sizes and settings.
        force: rebuild plans that exist with the same key.
        force_memory: build even if the forecast exceeds the free memory.
        on_progress: called with the graph, its finished share, 0 to 1, and the phase.
        find_gpu: returns the GPU of this machine.
        available_bytes: returns free memory plus swap, bytes.

    Raises:
        InputError: the forecast exceeds the free memory, or see ``engine_from_onnx``.
        BundleError: the bundle does not contain the precision.
        SessionError, MissingDependencyError: see ``engine_from_onnx``.
    """
    trt, gpu = import_tensorrt(target.backend), find_gpu()
    builds = graph_builds(bundle, target, integrated=gpu is not None and gpu.integrated)
    folder = _folder(bundle, target, trt, gpu)
    cached = {} if force else _cached(builds, folder, trt, target, gpu)
    needed = [build.memory_bytes for build in builds if build.graph not in cached]
    if needed and not force_memory:
        check_memory(max(needed), available_bytes(), target.precision)
    for build in builds:
        if build.graph in cached:
            yield BuiltPlan(
                graph=build.graph,
                path=folder / f"{build.graph}.plan",
                record=cached[build.graph],
                cached=True,
                notes=(),
            )
        else:
            yield _build_one(bundle, build, target, gpu, on_progress)


def _build_one(
    bundle: Bundle,
    build: GraphBuild,
    target: BuildTarget,
    gpu: Gpu | None,
    on_progress: Callable[[str, float, str], None] | None,
) -> BuiltPlan:
    def report(share: float, phase: str) -> None:
        if on_progress is not None:
            on_progress(build.graph, share, phase)

    report(0.0, "parse")
    built = engine_from_onnx(
        build.onnx_path, target, profile=build.profile, gpu=gpu, on_progress=report
    )
    path = save_plan(bundle, built.plan, built.record)
    report(1.0, "stored")
    return BuiltPlan(
        graph=build.graph, path=path, record=built.record, cached=False, notes=built.notes
    )


def _folder(bundle: Bundle, target: BuildTarget, trt: Any, gpu: Gpu | None) -> pathlib.Path:
    capabilities, lowest = built_for(target, gpu)
    name = plan_path_name(
        target.backend, str(trt.__version__), capabilities, lowest, target.variant
    )
    return bundle.path / ENGINES_FOLDER / name


def _cached(
    builds: list[GraphBuild], folder: pathlib.Path, trt: Any, target: BuildTarget, gpu: Gpu | None
) -> dict[str, PlanRecord]:
    """Return the records of intact plans that were built from exactly the same parts."""
    records = {}
    for build in builds:
        parts = plan_parts(trt, build.onnx_path, target, build.profile, gpu)
        record = cached_record(folder, build.graph, plan_key(**parts))
        if record is not None:
            records[build.graph] = record
    return records
