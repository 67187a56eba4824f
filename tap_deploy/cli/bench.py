"""``tap-export bench``: latency of a bundle, next to other runtimes."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import click

from tap_deploy.bench.candidate import NEED_WEIGHTS, Setup
from tap_deploy.bench.workloads import STAGE, WORKLOADS
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.console.extras import require_export_extra
from tap_deploy.console.options import FILE, bundle_argument, runtime_options
from tap_deploy.console.progress import stage_bar
from tap_deploy.errors import InputError
from tap_deploy.sessions.options import DeviceOptions
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.storage.files import check_file_output
from tap_deploy.timing import MIN_ITERATIONS, MIN_SECONDS, WARM_UP_SECONDS

SECONDS = click.FloatRange(0, 86_400)


def counts(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    """Return the whole numbers of a list such as ``1,16,64``, each once, in order."""
    if not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", text):
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 1,16,64")
    return tuple(dict.fromkeys(map(int, text.split(","))))


def share(context: click.Context, option: click.Parameter, text: str | None) -> float | None:
    """Return the share of a percentage with its sign: 0.05 for ``5%``."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,4}(?:\.\d+)?) ?%", text)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a percentage such as 5%")
    return float(match[1]) / 100


@click.command("bench")
@bundle_argument
@runtime_options
@click.option(
    "--workload",
    type=click.Choice(WORKLOADS),
    default=STAGE,
    show_default=True,
    help="stage: each stage alone; click: 1 point; vg: 47 boxes; lvis: 166 boxes without captions; "
    "everything: a grid of points; stream: 30 pictures of 5 boxes.",
)
@click.option(
    "--prompts",
    metavar="P,P,…",
    callback=counts,
    default="1,16,64",
    show_default=True,
    help="Regions per call of workload stage.",
)
@click.option("--tokens", type=click.IntRange(min=1), help="Longest caption; default: the model's.")
@click.option(
    "--iterations",
    type=click.IntRange(min=1),
    default=MIN_ITERATIONS,
    show_default=True,
    help="Minimum number of timed calls.",
)
@click.option(
    "--duration",
    type=SECONDS,
    default=MIN_SECONDS,
    show_default=True,
    help="Minimum duration of the timed calls, seconds.",
)
@click.option(
    "--warmup",
    type=SECONDS,
    default=WARM_UP_SECONDS,
    show_default=True,
    help="Minimum duration of the warm-up, seconds.",
)
@click.option("--cuda-graphs/--no-cuda-graphs", default=True, show_default=True)
@click.option("--zero-copy", is_flag=True, help="Mapped host memory, for boards that share DRAM.")
@click.option(
    "--against",
    default="",
    metavar="A,B,…",
    help=f"Candidates to time in turns with the bundle: {', '.join(NEED_WEIGHTS)}, a backend, a "
    "precision; or the --json file of an earlier run.",
)
@click.option("--checkpoint", type=FILE, help="Weights of the bundle, for torch and its exports.")
@click.option(
    "--max-regression",
    metavar="N%",
    callback=share,
    help="Exit with 1 if a median is slower by more than this, such as 5%, than in the file of "
    "--against.",
)
@click.option(
    "--choose",
    is_flag=True,
    help="Only measure which backend runs each graph faster on this CPU, and keep the times for "
    "--backend cpu.",
)
@click.option("--json", "json_path", type=FILE, help="Write the report to a file.")
@click.option("--plot", type=FILE, help="Draw the medians as an SVG file.")
def bench_command(
    bundle: str,
    run_on: RunOn,
    against: str,
    checkpoint: pathlib.Path | None,
    tokens: int | None,
    cuda_graphs: bool,
    zero_copy: bool,
    max_regression: float | None,
    choose: bool,
    json_path: pathlib.Path | None,
    plot: pathlib.Path | None,
    **values: Any,
) -> None:
    """Time BUNDLE on this machine.

    Candidates of --against take turns with the bundle, and the ratio is taken over pairs of
    neighbouring calls. All workloads except stage go through TapPredictor, from pictures in memory
    to masks, names and captions.
    """
    if choose:
        _choose(pathlib.Path(bundle), run_on)
        return
    from tap_deploy.bench.plot import save_plot
    from tap_deploy.bench.regression import require_no_regression
    from tap_deploy.bench.report import load_report, save_report
    from tap_deploy.bench.run import Settings, run
    from tap_deploy.bench.table import describe

    for path in filter(None, (json_path, plot)):
        check_file_output(path, force=True)
    names = [name.strip() for name in against.split(",") if name.strip()]
    files = [name for name in names if name.endswith(".json")]
    others = tuple(dict.fromkeys(name for name in names if name not in files))
    if max_regression is not None and len(files) != 1:
        raise InputError(
            f"--max-regression got {len(files)} saved runs; expected one: --against FILE.json"
        )
    saved = {name: load_report(pathlib.Path(name)) for name in files}
    if {*others} & {*NEED_WEIGHTS}:
        require_export_extra()
    setup = Setup(
        bundle=pathlib.Path(bundle),
        run_on=run_on,
        options=DeviceOptions(cuda_graphs=cuda_graphs, zero_copy=zero_copy),
        checkpoint=checkpoint,
        tokens=tokens,
    )
    settings = Settings(
        workload=values["workload"],
        prompts=values["prompts"],
        iterations=values["iterations"],
        seconds=values["duration"],
        warm_up_seconds=values["warmup"],
        against=others,
    )
    steps = 6 + 2 * len(others) + (3 * len(settings.prompts) if settings.workload == STAGE else 1)
    with stage_bar("bench", steps) as stage:
        report = run(setup, settings, on_step=stage)
    click.echo(describe(report, saved))
    if json_path is not None:
        save_report(report, json_path)
    if plot is not None:
        save_plot(report, plot)
    if max_regression is not None:
        require_no_regression(report, saved[files[0]], max_regression)


def _choose(path: pathlib.Path, run_on: RunOn) -> None:
    """Measure both CPU backends on every graph, and print the times."""
    from tap_deploy.engines.verdict.choose import measure_cpu_choice

    bundle = Bundle.open(path)
    with stage_bar("bench", 6) as stage:
        times = measure_cpu_choice(bundle, threads=run_on.threads, on_stage=stage)
    for precision, by_graph in times.items():
        for graph, by_backend in by_graph.items():
            fastest = min(by_backend, key=lambda backend: by_backend[backend])
            found = ", ".join(f"{name} {ms:.1f} ms" for name, ms in by_backend.items())
            click.echo(f"{precision} {graph}: {fastest} ({found})")
