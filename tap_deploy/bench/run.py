"""Runs a benchmark: loads the candidates, times them in turns, returns the report."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tap_deploy.bench.candidate import PLAIN, TORCH_BF16, Candidate, Setup
from tap_deploy.bench.candidates import BundleCandidate, candidate_from_name, require_candidate
from tap_deploy.bench.ceilings import Ceilings, cpu_ceilings, gpu_ceilings
from tap_deploy.bench.conditions import MemoryMark, conditions, peak_memory
from tap_deploy.bench.first_region import measure_start_up
from tap_deploy.bench.report import SCHEMA, VERSION
from tap_deploy.bench.roofline import roofline
from tap_deploy.bench.tasks import Task, figures
from tap_deploy.bench.workloads import STAGE, workload
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.errors import InputError
from tap_deploy.machine.cpu import usable_cores
from tap_deploy.machine.host import Host
from tap_deploy.machine.state import gpu_conditions
from tap_deploy.timing import (
    MIN_ITERATIONS,
    MIN_SECONDS,
    WARM_UP_SECONDS,
    Latency,
    Ratio,
    durations,
)

DEFAULT_PROMPTS = (1, 16, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run; see the options of ``tap-export bench``.

    Attributes:
        workload: one of ``WORKLOADS``.
        prompts: regions per call of workload ``stage``.
        iterations: minimum number of timed calls of each candidate and row.
        seconds: minimum duration of the timed calls of each candidate and row, seconds.
        warm_up_seconds: minimum duration of the warm-up, seconds.
        against: names of the other candidates.
        in_new_process: also measure start-up and ceilings, each in a process of its own.
    """

    workload: str = STAGE
    prompts: tuple[int, ...] = DEFAULT_PROMPTS
    iterations: int = MIN_ITERATIONS
    seconds: float = MIN_SECONDS
    warm_up_seconds: float = WARM_UP_SECONDS
    against: tuple[str, ...] = ()
    in_new_process: bool = True


def run(
    setup: Setup,
    settings: Settings,
    *,
    host: Host | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Run a benchmark.

    Args:
        setup: bundle, backend and options.
        settings: workload, durations and the other candidates.
        host: the machine; None for this one.
        on_step: called with the name of each step before it starts.

    Returns:
        The report as JSON types; ``report.save_report`` writes it.

    Raises:
        InputError: a candidate is unknown or cannot run the workload.
        TapError: a candidate cannot be loaded, or failed.
    """
    host = Host() if host is None else host
    for name in settings.against:
        require_candidate(name, setup)
    on_step("check the bundle")
    bundle = Bundle.open(setup.bundle)
    noted = conditions(bundle, setup.run_on, _noted(setup, settings, bundle), host)
    before = MemoryMark.now(host)
    start_up = _start_up(setup, settings, on_step)
    with contextlib.ExitStack() as stack:
        on_step("load")
        candidates: list[Candidate] = [BundleCandidate(setup, bundle)]
        stack.callback(candidates[0].close)
        for name in settings.against:
            on_step(f"load {name}")
            candidates.append(candidate_from_name(name, setup))
            stack.callback(candidates[-1].close)
        on_step("measure ceilings")
        ceilings, problem = _ceilings(setup, settings)
        rows = _timed(candidates, settings, stack, on_step)
        on_step("measure ceilings again")
        again, _ = _ceilings(setup, settings)
        after = MemoryMark.now(host)
    if ceilings is not None and again is not None:
        ceilings = Ceilings.best(ceilings, again)
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "subject": candidates[0].name,
        "conditions": noted | {"gpu_after": gpu_conditions(host)},
        "candidates": {
            candidate.name: {
                "precision": candidate.precision,
                "details": candidate.details,
                "start_up": found,
            }
            for candidate, found in zip(candidates, start_up, strict=True)
        },
        "ceilings": None if ceilings is None else dataclasses.asdict(ceilings),
        "ceilings_problem": problem,
        "memory": peak_memory(before, after, host),
        "rows": [row.as_json(candidates, ceilings) for row in rows],
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    """Durations of one task.

    Attributes:
        key: name of the row.
        tasks: candidate -> its task.
        seconds: candidate -> duration of each call, seconds.
        gpu_ms: candidate -> time of each call on the GPU, ms.
    """

    key: str
    tasks: Mapping[str, Task]
    seconds: Mapping[str, list[float]]
    gpu_ms: Mapping[str, list[float]]

    def as_json(self, candidates: Sequence[Candidate], ceilings: Ceilings | None) -> dict[str, Any]:
        """Return figures and ratios as JSON types; ratios are over the first candidate."""
        base, *others = self.seconds
        return {
            "row": self.key,
            "candidates": {
                candidate.name: self._figures(candidate, ceilings)
                for candidate in candidates
                if candidate.name in self.tasks
            },
            "ratios": {
                name: _ratio_json(Ratio.of(self.seconds[name], self.seconds[base]))
                for name in others
            },
        }

    def _figures(self, candidate: Candidate, ceilings: Ceilings | None) -> dict[str, Any]:
        task = self.tasks[candidate.name]
        latency = Latency.from_seconds(self.seconds[candidate.name])
        values = figures(task, latency, self.gpu_ms.get(candidate.name))
        if ceilings is not None:
            bound = roofline(candidate.config, task, candidate.precision, ceilings)
            values["roofline"] = None if bound is None else bound.shared(latency.median_ms)
        return values


def _ratio_json(ratio: Ratio) -> dict[str, Any]:
    return dataclasses.asdict(ratio) | {
        "spread": ratio.spread,
        "is_undecided": ratio.is_undecided,
    }


def _timed(
    candidates: Sequence[Candidate],
    settings: Settings,
    stack: contextlib.ExitStack,
    on_step: Callable[[str], None],
) -> list[_Row]:
    """Time the rows of the first candidate, each with the candidates that have it."""
    tasks = [
        {task.key: task for task in _tasks(candidate, settings, stack)} for candidate in candidates
    ]
    rows = []
    for key in tasks[0]:
        on_step(key)
        own = {
            c.name: found[key] for c, found in zip(candidates, tasks, strict=True) if key in found
        }
        gpu_ms: dict[str, list[float]] = {name: [] for name, task in own.items() if task.gpu_ms}

        def after_call(name: str, own: Any = own, gpu_ms: Any = gpu_ms) -> None:
            if name in gpu_ms:
                gpu_ms[name].append(own[name].gpu_ms())

        seconds = durations(
            {name: task.call for name, task in own.items()},
            min_iterations=settings.iterations,
            min_seconds=settings.seconds,
            warm_up_seconds=settings.warm_up_seconds,
            after_call=after_call,
        )
        rows.append(_Row(key=key, tasks=own, seconds=seconds, gpu_ms=gpu_ms))
    return rows


def _tasks(candidate: Candidate, settings: Settings, stack: contextlib.ExitStack) -> list[Task]:
    if settings.workload == STAGE:
        return stack.enter_context(candidate.stage_tasks(settings.prompts))
    return [candidate.task(workload(settings.workload, candidate.config))]


def _start_up(
    setup: Setup, settings: Settings, on_step: Callable[[str], None]
) -> list[dict[str, Any] | None]:
    """Start every candidate in a new process; None where that is not measured."""
    found: list[dict[str, Any] | None] = []
    for name in (None, *settings.against):
        # Plain onnxruntime exports its graphs first, which is not part of its start-up.
        if not settings.in_new_process or name == PLAIN:
            found.append(None)
            continue
        on_step(f"start {name or 'the bundle'}")
        more = None if settings.workload == STAGE else settings.workload
        found.append(dataclasses.asdict(measure_start_up(name, setup.to_dict(), more)))
    return found


def _ceilings(setup: Setup, settings: Settings) -> tuple[Ceilings | None, str | None]:
    """Return the ceilings of the device, or why they were not measured."""
    if not settings.in_new_process:
        return None, "not asked for"
    try:
        if setup.run_on.on_cpu:
            with_torch = TORCH_BF16 in settings.against
            return cpu_ceilings(setup.run_on.threads, with_torch=with_torch), None
        return gpu_ceilings(setup.run_on.resolved_device.index), None
    except InputError as exc:
        return None, str(exc)


def _noted(setup: Setup, settings: Settings, bundle: Bundle) -> dict[str, Any]:
    """Return the settings for the report."""
    run_on, values = setup.run_on, dataclasses.asdict(settings)
    values |= {"batch": 1, "tokens": setup.tokens, "device": str(run_on.resolved_device)}
    values["threads"] = (run_on.threads or usable_cores()) if run_on.on_cpu else None
    for name in ("cuda_graphs", "zero_copy"):  # there are none on a CPU
        values[name] = None if run_on.on_cpu else getattr(setup.options, name)
    size = bundle.config.image_size
    values["picture"] = [size, size]
    if settings.workload != STAGE:
        values["picture"] = list(
            workload(settings.workload, bundle.config).pictures[0].shape[1::-1]
        )
    return values
