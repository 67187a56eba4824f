"""``tap-export selftest``: checks that this machine computes the graphs of a bundle correctly."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.plans import plan_folder
from tap_deploy.console.options import bundle_argument, json_option, selftest_runtime_options
from tap_deploy.console.progress import stage_bar
from tap_deploy.machine.state import machine_title
from tap_deploy.sessions.cpu_choice import installed, version
from tap_deploy.sessions.gpu.open_memory import open_device_memory
from tap_deploy.sessions.opening import pipeline_from_bundle, sessions_from_bundle
from tap_deploy.sessions.ort.session import import_onnxruntime
from tap_deploy.sessions.run_on import FASTEST_ON_CPU, RunOn
from tap_deploy.sessions.trt.versions import import_tensorrt
from tap_deploy.verify.comparison import Comparison
from tap_deploy.verify.graph_check import number_of_checks
from tap_deploy.verify.pipeline_check import CHECKS_PER_RUN, RUNS
from tap_deploy.verify.polygraphy import commands_after
from tap_deploy.verify.selftest import SelftestResult, SelftestSubject, run_selftest


@click.command("selftest")
@bundle_argument
@selftest_runtime_options
@json_option
def selftest_command(bundle: str, run_on: RunOn, as_json: bool) -> None:
    """Test BUNDLE on this machine, and store the result in it.

    Tests each graph, then the pipeline as a predictor runs it; on a GPU, the last run replays CUDA
    graphs. A failure exits with 1, and run and TapPredictor then refuse these graphs, unless
    failures are allowed. To compare without storing a result: tap-export verify.
    """
    opened = Bundle.open(bundle)
    checks = number_of_checks([opened.golden()]) + len(RUNS) * CHECKS_PER_RUN
    with stage_bar("selftest", checks) as stage:
        result = selftest_bundle(opened, run_on, on_check=lambda c: stage(c.tensor))
    click.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
    if not result.passed and not as_json:
        click.echo(commands_after(result, pathlib.Path("polygraphy")))
    result.require()


def selftest_bundle(
    bundle: Bundle, run_on: RunOn, *, on_check: Callable[[Comparison], None] | None = None
) -> SelftestResult:
    """Run the golden samples of a bundle, and store the verdict; see ``run_selftest``.

    Args:
        bundle: an opened bundle.
        run_on: what runs the graphs; with ``allow_failed``, or a failure cannot be repeated.
        on_check: called with every comparison as it is made.
    """
    return run_selftest(
        selftest_subject(bundle, run_on),
        lambda: sessions_from_bundle(bundle, run_on),
        load_pipeline=lambda: pipeline_from_bundle(bundle, run_on),
        on_check=on_check,
    )


def _backend_version(run_on: RunOn) -> str:
    if run_on.is_engine:
        return str(import_tensorrt(run_on.backend).__version__)
    if not run_on.on_cpu:
        return str(import_onnxruntime().__version__)
    if run_on.backend == FASTEST_ON_CPU:
        return ", ".join(f"{name} {number}" for name, number in installed().items())
    return version(run_on.backend)


def selftest_subject(bundle: Bundle, run_on: RunOn) -> SelftestSubject:
    """Find out which versions run the graphs here, and where the verdict belongs."""
    version, plans = _backend_version(run_on), None
    if not run_on.on_cpu:  # a predictor needs a CUDA binding; report a missing one before the run
        memory = open_device_memory(run_on.resolved_device.index)
    if run_on.is_engine:
        plans = plan_folder(
            bundle,
            backend=run_on.backend,
            backend_version=version,
            compute_capability=memory.compute_capability,
            variant=run_on.variant,
        )
    return SelftestSubject(
        bundle=bundle,
        run_on=run_on,
        backend_version=version,
        device=machine_title(on_cpu=run_on.on_cpu),
        plans=plans,
    )
