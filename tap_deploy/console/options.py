"""Options that several commands share, and groups of options that become one object."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

import click

from tap_deploy.precisions import RUN_PRECISIONS
from tap_deploy.sessions.ort.providers import PROVIDERS
from tap_deploy.sessions.run_on import BACKENDS, RunOn

Command = TypeVar("Command", bound=Callable[..., Any])


class NamedPath(click.Path):
    """A path that is not empty: an empty one, as from an unset variable, means ``.``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; fail if it is empty."""
        if not os.fspath(value):
            self.fail("the path is empty; is a variable of the shell not set?", param, ctx)
        return super().convert(value, param, ctx)


FILE = NamedPath(path_type=pathlib.Path)

bundle_argument = click.argument("bundle", type=NamedPath())
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
force_option = click.option("--force", is_flag=True, help="Replace existing outputs.")
backend_option = click.option(
    "--backend",
    default="onnxruntime",
    show_default=True,
    help=f"What runs the graphs: {', '.join(BACKENDS)}.",
)
samples_option = click.option(
    "--samples",
    multiple=True,
    type=FILE,
    metavar="DIR|FILE",
    help="Pictures to measure activations on, in addition to the golden samples; repeatable.",
)
strict_option = click.option(
    "--strict", is_flag=True, help="Stop at an unreadable picture instead of skipping it."
)
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads; default: all usable cores."
)


def option_group(
    name: str, build: Callable[..., object], *options: Callable[[Any], Any]
) -> Callable[[Command], Command]:
    """Return a decorator that adds options to a command, which receives them as one object.

    Args:
        name: parameter of the command that receives the object.
        build: makes the object from the values of the options, by keyword; usually a dataclass.
        options: ``click.option`` decorators, in the order of ``--help``.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def call(**values: Any) -> Any:
            own = {key: values.pop(key) for key in keys}
            return command(**{name: build(**own)}, **values)

        known = len(getattr(call, "__click_params__", []))
        for option in reversed(options):
            option(call)
        keys = [parameter.name for parameter in vars(call)["__click_params__"][known:]]
        return call  # type: ignore[return-value]  # it takes other arguments, by design

    return decorate


device_option = click.option(
    "--device",
    metavar="cpu|cuda|cuda:N",
    help="Where the graphs run; default: the first GPU with engines, cpu with the others.",
)
provider_option = click.option(
    "--provider",
    type=click.Choice(list(PROVIDERS)),
    help="How onnxruntime uses a GPU; default: cuda.",
)
allow_failed_option = click.option(
    "--allow-failed",
    is_flag=True,
    help="Also use graphs and engines that failed their accuracy check or self-test.",
)
_RUNTIME = (
    backend_option,
    click.option(
        "--precision",
        default="fp32",
        show_default=True,
        type=click.Choice(RUN_PRECISIONS),
        help="Which graphs of the bundle to use; bf16 needs --backend openvino or cpu.",
    ),
    device_option,
    provider_option,
    threads_option,
)
runtime_options = option_group(
    "run_on",
    RunOn,
    *_RUNTIME,
    allow_failed_option,
    click.option(
        "--require-verified",
        is_flag=True,
        help="Refuse graphs and engines that never passed selftest or verify on this machine.",
    ),
)
# A self-test repeats what failed before.
selftest_runtime_options = option_group(
    "run_on", functools.partial(RunOn, allow_failed=True), *_RUNTIME
)
