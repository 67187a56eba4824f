"""Options of what runs the graphs, in one or more precisions."""

from __future__ import annotations

from typing import Any

import click

from tap_deploy.console.options import (
    allow_failed_option,
    backend_option,
    device_option,
    option_group,
    provider_option,
    threads_option,
)
from tap_deploy.precisions import FP32, RUN_PRECISIONS
from tap_deploy.sessions.run_on import RunOn


def _run_on_each(precisions: tuple[str, ...], **options: Any) -> list[RunOn]:
    return [RunOn(precision=precision, **options) for precision in dict.fromkeys(precisions)]


runs_options = option_group(
    "run_on",
    _run_on_each,
    backend_option,
    click.option(
        "--precision",
        "precisions",
        default=(FP32,),
        show_default=FP32,
        multiple=True,
        type=click.Choice(RUN_PRECISIONS),
        help="Which graphs of the bundle to use; repeat it to compare several.",
    ),
    device_option,
    provider_option,
    threads_option,
    allow_failed_option,
)
