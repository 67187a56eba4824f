"""Pages from the templates in ``templates/``: values are escaped, and a page loads nothing."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tap_deploy.optional_modules import require_module

if TYPE_CHECKING:
    import jinja2

_NONE = "-"


def page_from_template(name: str, values: Mapping[str, Any]) -> str:
    """Return an HTML document.

    Args:
        name: file name of the template.
        values: name in the template -> value. Texts may come from untrusted files.

    Raises:
        MissingDependencyError: Jinja2 is not installed.
    """
    return _environment().get_template(name).render(values)


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with this many decimals; "-" for None."""
    return _NONE if value is None else f"{value:.{digits}f}"


def scientific(value: float | None) -> str:
    """Return a number as mantissa and exponent, such as 1.25e-04; "-" for None."""
    return _NONE if value is None else f"{value:.2e}" if value else "0"


def percent(value: float | None) -> str:
    """Return a share of 0..1 in percent; "-" for None."""
    return _NONE if value is None else f"{value:.1%}"


def plain(value: Any) -> str:
    """Return any JSON value as text on one line, for tables of settings and conditions."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) or _NONE
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or _NONE
    if value is None or isinstance(value, bool):
        return {None: _NONE, True: "yes", False: "no"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@functools.cache
def _environment() -> jinja2.Environment:
    require_module("jinja2", "an HTML report", "report")
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tap_deploy.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (number, scientific, percent, plain):
        environment.filters[function.__name__] = function
    return environment
