"""Benchmarks every stage of a bundle on any backend, and reports the conditions.

python -m benchmarks.engines BUNDLE --backend tensorrt --precision fp16 --json FILE
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import click

from benchmarks.conditions import MemoryMark, conditions, peak_memory
from benchmarks.stages import CAPTION, ENCODE, Inputs, Stage, stages
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.console.exits import CleanExits
from tap_deploy.console.options import FILE, runtime_options
from tap_deploy.errors import InputError
from tap_deploy.machine.host import Host
from tap_deploy.machine.state import gpu_conditions
from tap_deploy.sessions.opening import pipeline_from_bundle
from tap_deploy.sessions.options import DeviceOptions
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.storage.files import atomic_file
from tap_deploy.timing import MIN_ITERATIONS, MIN_SECONDS, Latency, measure

BASELINE = "PyTorch eager fp32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run; see the options of the command.

    Attributes:
        run_on: backend, precision, device and threads.
        prompts: numbers of regions per call to measure.
        tokens: maximum number of caption tokens; None for the model's limit.
        iterations: minimum number of measured calls.
        seconds: minimum time per stage, seconds.
        cuda_graphs: use CUDA graphs.
        zero_copy: use mapped host memory.
    """

    run_on: RunOn
    prompts: tuple[int, ...]
    tokens: int | None
    iterations: int
    seconds: float
    cuda_graphs: bool
    zero_copy: bool


@click.command(cls=CleanExits)
@click.argument("bundle", type=FILE)
@runtime_options
@click.option(
    "--prompts",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 16, 64),
    show_default=True,
    help="Regions per call; may be repeated.",
)
@click.option("--tokens", type=click.IntRange(min=1), help="Longest caption; default: the model's.")
@click.option("--iterations", type=click.IntRange(min=1), default=MIN_ITERATIONS, show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=MIN_SECONDS,
    show_default=True,
    help="Minimum time per stage.",
)
@click.option("--cuda-graphs/--no-cuda-graphs", default=True, show_default=True)
@click.option("--zero-copy", is_flag=True, help="Mapped host memory, for boards that share DRAM.")
@click.option("--peaks", help="Also report shares of the peak performance of a device profile.")
@click.option("--checkpoint", type=FILE, help="Also time PyTorch with these weights.")
@click.option("--json", "json_path", type=FILE, help="Write figures and conditions to a file.")
def main(
    bundle: pathlib.Path,
    peaks: str | None,
    checkpoint: pathlib.Path | None,
    json_path: pathlib.Path | None,
    **options: Any,
) -> None:
    """Time encoder, prompt decoder, captions and the whole pipeline on this machine."""
    opened, settings = Bundle.open(bundle), Settings(**options)
    report = run(opened, settings, checkpoint, on_row=click.echo)
    if peaks is not None:
        from benchmarks.peak_share import peak_shares

        report["peaks"] = peak_shares(opened, settings.run_on, peaks, report["stages"])
    click.echo(summary(report))
    if json_path is not None:
        with atomic_file(json_path) as partial:
            partial.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def run(
    bundle: Bundle,
    settings: Settings,
    checkpoint: pathlib.Path | None = None,
    *,
    host: Host | None = None,
    on_row: Any = lambda line: None,
) -> dict[str, Any]:
    """Time the stages; return results and conditions as JSON types.

    Raises:
        InputError: every number of prompts exceeds the limit of the engines.
        TapError: the bundle cannot be loaded on this backend.
    """
    host = Host() if host is None else host
    values = dataclasses.asdict(settings)
    values = values.pop("run_on") | values
    if settings.run_on.on_cpu:
        values["cuda_graphs"] = values["zero_copy"] = None  # not applicable
    report = conditions(bundle, settings.run_on, values, host)
    before = MemoryMark.now(host)
    options = DeviceOptions(cuda_graphs=settings.cuda_graphs, zero_copy=settings.zero_copy)
    pipeline = pipeline_from_bundle(bundle, settings.run_on, options)
    try:
        prompts = _fitting(settings.prompts, pipeline.max_prompts)
        on_row(header(settings, checkpoint is not None))
        with stages(bundle, pipeline, prompts, settings.tokens) as rows:
            inputs = Inputs.random(bundle.config, max(prompts))
            baseline_of = _with_baseline(bundle, settings, checkpoint, inputs)
            timed = list(_timed(rows, settings, baseline_of, on_row))
        after = MemoryMark.now(host)
    finally:
        pipeline.close()
    return {
        "conditions": report | {"gpu_after": gpu_conditions(host)},
        "memory": peak_memory(before, after),
        "stages": timed,
    }


def _fitting(prompts: tuple[int, ...], most: int | None) -> tuple[int, ...]:
    fitting = tuple(count for count in prompts if most is None or count <= most)
    if not fitting:
        raise InputError(
            f"prompts are {list(prompts)}; expected at most {most}, the limit of the engines; "
            "lower --prompts, or build the engines with a larger --max-prompts"
        )
    for count in sorted(set(prompts) - set(fitting)):
        click.echo(f"note: P={count} skipped: the engines take at most {most} prompts", err=True)
    return fitting


def _with_baseline(
    bundle: Bundle, settings: Settings, checkpoint: pathlib.Path | None, inputs: Inputs
) -> Any:
    if checkpoint is None:
        return lambda stage: None
    from benchmarks.baseline import TorchBaseline

    baseline = TorchBaseline(
        checkpoint,
        bundle.config,
        on_gpu=not settings.run_on.on_cpu,
        threads=settings.run_on.threads,
    )
    return lambda stage: baseline.with_baseline(stage, inputs)


def _timed(
    rows: list[Stage], settings: Settings, baseline_of: Any, on_row: Any
) -> Iterator[dict[str, Any]]:
    for stage in rows:
        candidates = {settings.run_on.backend: stage.call}
        beside = baseline_of(stage)
        if beside is not None:
            candidates[BASELINE] = beside
        results = measure(
            candidates, min_iterations=settings.iterations, min_seconds=settings.seconds
        )
        on_row(table_row(stage, results, settings.run_on.backend))
        yield as_json(stage, results, settings.run_on.backend)


def as_json(stage: Stage, results: dict[str, Latency], backend: str) -> dict[str, Any]:
    """Return the results of a stage as JSON types; throughput is from the mean latency."""
    latency = results[backend]
    seconds = latency.mean_ms / 1e3
    values = {
        "stage": stage.name,
        "kind": stage.kind,
        "prompts": stage.prompts,
        "tokens": stage.tokens,
        "latency": dataclasses.asdict(latency),
        "is_noisy": latency.is_noisy,
        "images_per_second" if stage.kind == ENCODE else "regions_per_second": (
            stage.prompts / seconds
        ),
    }
    if stage.kind == CAPTION:
        steps = stage.tokens + 1  # the visual prefix is also a step
        values["microseconds_per_step"] = 1e3 * latency.median_ms / steps
        values["tokens_per_second"] = stage.prompts * stage.tokens / seconds
    if BASELINE in results:
        values["baseline"] = dataclasses.asdict(results[BASELINE])
        values["speed_up"] = results[BASELINE].median_ms / latency.median_ms
    return values


def header(settings: Settings, has_baseline: bool) -> str:
    """Return the header of the Markdown table."""
    run_on = settings.run_on
    columns = [f"{run_on.backend} {run_on.precision}", "median ms", "p90", "p99", "cv", "per s"]
    columns += [f"{BASELINE}, median ms", "ratio"] * has_baseline
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def table_row(stage: Stage, results: dict[str, Latency], backend: str) -> str:
    """Return the Markdown row of a stage."""
    latency = results[backend]
    noisy = " (noisy)" if latency.is_noisy else ""
    cells = [stage.name, *(f"{ms:.2f}" for ms in (latency.median_ms, latency.p90_ms))]
    cells += [f"{latency.p99_ms:.2f}", f"{100 * latency.cv:.1f} %{noisy}"]
    cells.append(f"{1e3 * stage.prompts / latency.mean_ms:.1f}")
    if BASELINE in results:
        median = results[BASELINE].median_ms
        cells += [f"{median:.2f}", f"{median / latency.median_ms:.2f}"]
    return f"| {' | '.join(cells)} |"


def summary(report: dict[str, Any]) -> str:
    """Return the conditions in a few lines, with warnings about them."""
    values = report["conditions"]
    machine, board = values["machine"], values["machine"]["jetson"]
    lines = [
        "",
        f"{values['date']}, {machine['title']}, {values['model']} ({values['weights']}), "
        f"{values['variant']} graphs",
        ", ".join(f"{name} {version}" for name, version in values["versions"].items()),
        f"peak memory of the process {report['memory']['peak_rss_bytes'] / 1e6:.0f} MB",
    ]
    if board is not None:
        mode = board["power_mode"]["name"] if board["power_mode"] else "unknown"
        lines.append(f"power mode {mode}, GPU clock {board['gpu_clock']}")
        if board["gpu_clock"] and board["gpu_clock"]["min_hz"] != board["gpu_clock"]["max_hz"]:
            lines.append("warning: the GPU clock is not locked; lock it: sudo jetson_clocks")
    for share in report.get("peaks", []):
        lines.append(
            f"{share['stage']}: {100 * share['share_of_arithmetic_peak']:.0f} % of the peak "
            f"arithmetic, {100 * share['share_of_bandwidth']:.0f} % of the peak bandwidth of "
            f"{share['device']}"
        )
    noisy = [stage["stage"] for stage in report["stages"] if stage["is_noisy"]]
    if noisy:
        lines.append(
            f"warning: variation above 2.5 %, the machine was not idle: {', '.join(noisy)}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
