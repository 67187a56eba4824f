"""``tap-export selftest``: does this machine compute what the model says?"""

from __future__ import annotations

import json
from typing import Any

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.marks import mark_name
from tap_deploy.bundle.plans import plan_folder
from tap_deploy.cli.options import (
    backend_option,
    bundle_argument,
    device_option,
    json_option,
    precision_option,
    provider_option,
    threads_option,
)
from tap_deploy.cli.verify import CHECKS_PER_SAMPLE
from tap_deploy.console.progress import stage_bar
from tap_deploy.machine.state import machine_state
from tap_deploy.precisions import variant_for
from tap_deploy.sessions.gpu.open_memory import open_device_memory
from tap_deploy.sessions.opening import ENGINE_BACKENDS, pipeline_from_bundle, sessions_from_bundle
from tap_deploy.sessions.options import CPU, CUDA, Device
from tap_deploy.sessions.ort.session import import_onnxruntime
from tap_deploy.sessions.trt.versions import import_tensorrt
from tap_deploy.verify.pipeline_check import CHECKS_PER_RUN, RUNS
from tap_deploy.verify.selftest import SelftestSubject, run_selftest

CHECKS = CHECKS_PER_SAMPLE + len(RUNS) * CHECKS_PER_RUN


@click.command("selftest")
@bundle_argument
@backend_option
@precision_option
@device_option
@provider_option
@threads_option
@json_option
def selftest_command(
    bundle: str,
    backend: str,
    precision: str,
    device: str | None,
    provider: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Run the golden samples of BUNDLE on this machine, and keep the verdict in BUNDLE.

    First graph by graph, then twice as a predictor does: on a GPU, the second run is replayed.
    What fails is marked, and refused by run and TapPredictor unless they are told otherwise;
    exit code 1. To look without marking: tap-export verify.
    """
    opened = Bundle.open(bundle)
    subject = _subject(opened, backend, precision, device, provider)
    load: dict[str, Any] = {
        "threads": threads,
        "device": device,
        "provider": provider,
        "allow_failed": True,
    }
    with stage_bar("selftest", CHECKS) as stage:
        result = run_selftest(
            subject,
            lambda: sessions_from_bundle(opened, backend, precision, **load),
            load_pipeline=lambda: pipeline_from_bundle(opened, backend, precision, **load),
            on_check=lambda check: stage(check.tensor),
        )
    click.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
    result.require()


def _subject(
    bundle: Bundle, backend: str, precision: str, device: str | None, provider: str | None
) -> SelftestSubject:
    """Find out what runs the graphs here, and where its verdict belongs."""
    is_engine = backend in ENGINE_BACKENDS
    on_cpu = not is_engine and Device.from_name(device or CPU).kind == CPU
    variant = variant_for(precision, on_cpu=on_cpu)
    runtime = import_tensorrt(backend) if is_engine else import_onnxruntime()
    plans = None
    if not on_cpu:  # a predictor needs it, so what is missing is to be said before anything is run
        memory = open_device_memory(Device.from_name(device or CUDA).index)
    if is_engine:
        plans = plan_folder(
            bundle,
            backend=backend,
            backend_version=str(runtime.__version__),
            compute_capability=memory.compute_capability,
            variant=variant,
        )
    return SelftestSubject(
        bundle=bundle,
        backend=mark_name(backend, on_cpu=is_engine or on_cpu, provider=provider),
        precision=precision,
        variant=variant,
        backend_version=str(runtime.__version__),
        device=machine_state().title,
        plans=plans,
    )
