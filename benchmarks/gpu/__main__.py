"""The command line of ``scripts/test-gpu``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence

from benchmarks.gpu.context import VIT_B, Context, read_json
from benchmarks.gpu.machine import gpu_problem
from benchmarks.gpu.markdown import markdown
from benchmarks.gpu.report import REPORT_FILE, Report, exit_code, line
from benchmarks.gpu.runner import StepResult, child, run_steps, this_command
from benchmarks.gpu.steps import STEPS, Step, select

DESCRIPTION = (
    "Test and benchmark the project on a machine with an NVIDIA GPU, without installing it."
)
EPILOG = """\
Each step runs in its own process with its own time limit; if a step fails, crashes or hangs, the
run continues. gpu-report.json is rewritten after every step; gpu-report/ contains all logs.

Exit codes: 0 every step that could run passed, 1 a step failed, 2 no GPU step could run, or bad
arguments.

If time is short or the machine has no network, make the bundles on another machine (a CPU is
enough), copy the folder, and pass it to the run:

  scripts/test-gpu --prepare FOLDER        takes minutes, needs the export extra
  scripts/test-gpu --bundle FOLDER --budget 420 --against torch

docs/gpu.md explains the report.
"""


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    """Run the command line; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--child"]:
        (step,) = [step for step in steps if step.name == arguments[1]]
        return child(step, Context.from_json(arguments[2]))
    options = _parser().parse_args(arguments)
    try:
        chosen = select(_names(options.steps), _names(options.against), steps)
    except ValueError as exc:
        return _refuse(str(exc))
    if options.list:
        for step in chosen:
            _print(f"{step.name:<20} {step.limit_s:4.0f} s  {step.title}")
        return 0
    if options.markdown is not None:
        return _print_tables(options.markdown)
    if options.prepare is not None:
        return _prepare(options.prepare)
    if options.bundle is not None and not (options.bundle / "prepared.json").is_file():
        return _refuse(
            f"{options.bundle} is not a prepared folder; make one with: scripts/test-gpu --prepare"
        )
    problem = gpu_problem()
    if problem is not None and not options.steps and any(step.uses_gpu for step in chosen):
        return _refuse(f"there is no GPU to test ({problem}); --steps host needs none")
    # Without the handler, a step would outlive this program and occupy the GPU.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return _run(options, chosen)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/test-gpu",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, folder = parser.add_argument, pathlib.Path
    add("--steps", metavar="A,B", help="run only these steps or groups, and their prerequisites")
    add("--against", metavar="torch", help="also run a baseline: PyTorch with the same weights")
    add("--budget", type=_seconds, metavar="S", help="seconds for all steps; default: no limit")
    add("--seconds", type=_seconds, default=1.0, metavar="S", help="seconds per measurement (1)")
    add("--bundle", type=folder, metavar="FOLDER", help="output of --prepare; default: made here")
    add("-o", "--output", type=folder, default=folder(), metavar="FOLDER", help="report folder (.)")
    add("--list", action="store_true", help="print the steps and exit")
    add("--prepare", type=folder, metavar="FOLDER", help="make the bundles; needs no GPU")
    add("--markdown", type=folder, metavar="REPORT", help="print tables of a gpu-report.json")
    return parser


def _run(options: argparse.Namespace, chosen: Sequence[Step]) -> int:
    logs = options.output.resolve() / "gpu-report"
    with _work_folder() as work:
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            return _refuse(f"{options.output} cannot be written: {exc}; choose another --output")
        context = Context(
            project=pathlib.Path(__file__).resolve().parents[2],
            logs=logs,
            work=work,
            prepared=None if options.bundle is None else options.bundle.resolve(),
            seconds=options.seconds,
            model=VIT_B,
        )
        settings = {"budget_s": options.budget, "seconds": options.seconds}
        report = Report(logs.parent / REPORT_FILE, settings | {"prepared": str(context.prepared)})

        def finished(result: StepResult) -> None:
            report.add(result)
            _print(line(result))

        run_steps(
            chosen,
            context,
            this_command(),
            budget_s=options.budget,
            on_result=finished,
            on_start=lambda step, limit_s: _say(f"{step.name}: {step.title} ({limit_s:.0f} s)"),
        )
    _say(f"{logs.parent / REPORT_FILE}; logs are in {logs}")
    return exit_code(report.results)


def _print_tables(path: pathlib.Path) -> int:
    report = read_json(path)
    if not report.get("steps"):
        return _refuse(f"{path} is not a report; expected a {REPORT_FILE}")
    _print(markdown(report))
    return 0


def _prepare(folder: pathlib.Path) -> int:
    try:
        from benchmarks.gpu.prepare import prepare
    except ImportError as exc:
        return _refuse(f'{exc}; preparing needs: pip install "tap-deploy[export]"')
    print(json.dumps(prepare(folder, _say), indent=2))
    return 0


@contextlib.contextmanager
def _work_folder() -> Iterator[pathlib.Path]:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="tap-gpu-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _names(text: str | None) -> list[str]:
    return [] if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds >= 0")
    return value


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader of the pipe has exited; still write the report
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str) -> None:
    print(f"==> {text}", file=sys.stderr, flush=True)


def _refuse(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
