"""The report as a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tap_deploy.engines.verdict.tally import evaluated_on
from tap_deploy.engines.verdict.verdict import FLOAT
from tap_deploy.precisions import INT8
from tap_deploy.report.page import page_from_template


def html_from_report(report: Mapping[str, Any]) -> str:
    """Return the report as an HTML document.

    Args:
        report: report from ``record.report_from_verdict``.

    Raises:
        MissingDependencyError: Jinja2 is not installed.
    """
    whole = report["whole"]
    agreements = {f"{name} alone": graph["agreement"] for name, graph in report["graphs"].items()}
    agreements |= {"everything in INT8": whole["everything_int8"], "best mix": whole["agreement"]}
    costs = {**report["graphs"], "whole": whole}
    titles = {INT8: "INT8", FLOAT: report["float_variant"]}
    values = {
        "report": report,
        "agreements": agreements,
        "costs": costs,
        "runtimes": {
            name: f"{titles.get(name, name)}, median ms (cv)"
            for cost in costs.values()
            for name in cost["latency_ms"]
        },
        "evaluated_on": evaluated_on(whole["agreement"]["regions"], whole["agreement"]["images"]),
        "mixed": report.get("mixed_precision"),
    }
    return page_from_template("verdict.html", values)
