"""Options that several commands share."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import click

from tap_deploy.precisions import PRECISIONS
from tap_deploy.sessions.opening import BACKENDS
from tap_deploy.sessions.ort.providers import PROVIDERS


class NamedPath(click.Path):
    """A path that is not empty: an empty one, as from a variable that is not set, is ``.``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; fail if it is empty."""
        if not os.fspath(value):
            self.fail("the path is empty; is a variable of the shell not set?", param, ctx)
        return super().convert(value, param, ctx)


FILE = NamedPath(path_type=pathlib.Path)

bundle_argument = click.argument("bundle", type=NamedPath())
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON, for programs."
)
force_option = click.option("--force", is_flag=True, help="Replace outputs that exist already.")
backend_option = click.option(
    "--backend",
    default="onnxruntime",
    show_default=True,
    help=f"What runs the graphs: {', '.join(BACKENDS)}.",
)
precision_option = click.option(
    "--precision",
    default="fp32",
    show_default=True,
    type=click.Choice(PRECISIONS),
    help="Which graphs of the bundle to use.",
)
samples_option = click.option(
    "--samples",
    multiple=True,
    type=FILE,
    metavar="DIR|FILE",
    help="Pictures to measure activations on, beside the golden samples; repeatable.",
)
strict_option = click.option(
    "--strict", is_flag=True, help="Stop at a picture that cannot be read, instead of skipping it."
)
device_option = click.option(
    "--device",
    metavar="cpu|cuda|cuda:N",
    help="Where the graphs run; default: cpu with onnxruntime, the first GPU with engines.",
)
provider_option = click.option(
    "--provider",
    type=click.Choice(list(PROVIDERS)),
    help="How onnxruntime uses a GPU; default: cuda.",
)
allow_failed_option = click.option(
    "--allow-failed",
    is_flag=True,
    help="Also use a precision or engines that failed their check.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads; default: all usable cores."
)
