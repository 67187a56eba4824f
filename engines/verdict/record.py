"""Storage of a verdict in the bundle: report, mark, and the best mix of int8 and float graphs."""

from __future__ import annotations

import dataclasses
import functools
import math
import platform
from collections.abc import Iterator, Mapping
from typing import Any

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.json_record import record_to_json
from tap_deploy.bundle.precision_record import PrecisionRecord, VerdictMark
from tap_deploy.bundle.update import bundle_addition
from tap_deploy.engines.verdict.report_html import html_from_report
from tap_deploy.engines.verdict.verdict import Verdict
from tap_deploy.errors import BundleError
from tap_deploy.machine.cpu import cpu_int8, cpu_name, usable_cpus
from tap_deploy.machine.host import Host
from tap_deploy.optional_modules import version_of
from tap_deploy.precisions import FP32, INT8, INT8_FP32
from tap_deploy.storage.json_files import json_text
from tap_deploy.timing import utc_now

REPORTS_FOLDER = "reports"
VERDICT_PREFIX = f"{REPORTS_FOLDER}/verdict-"
EXCLUSIONS_FILE = f"{REPORTS_FOLDER}/exclusions.json"


def record_verdict(
    bundle: Bundle, verdict: Verdict, *, notes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the report and the mark into the bundle, and apply the best mix.

    The mark applies to both int8 variants, which have the same Q/DQ nodes, but a pass does not lift
    the failure of a variant that was judged itself on another backend. A failed verdict does not
    change graphs. A passed one replaces each int8 graph that is not used by the float graph, in the
    judged variant only.

    Args:
        bundle: the judged bundle.
        verdict: the verdict.
        notes: further sections of the report: data, mixed precision, SmoothQuant.

    Returns:
        The report, plain JSON types.

    Raises:
        InputError: the bundle cannot be written, or another process has locked it.
        BundleError: another process changed the graphs or recorded a failure meanwhile; nothing is
            written.
    """
    report = report_from_verdict(bundle, verdict, notes or {})
    name = f"{VERDICT_PREFIX}{verdict.variant}"
    graphs = bundle.manifest.graphs
    judged_with = {FP32, verdict.variant, verdict.float_variant}
    with bundle_addition(bundle, based_on=judged_with) as addition:
        folder = addition.folder / REPORTS_FOLDER
        folder.mkdir()
        text = json_text(report, indent=2) + "\n"
        (addition.folder / f"{name}.json").write_text(text, "utf-8")
        page = html_from_report(report)
        (addition.folder / f"{name}.html").write_text(page, "utf-8", "backslashreplace")
        mark = VerdictMark(
            passed=verdict.passed,
            sentence=verdict.sentence,
            backend=verdict.backend,
            judged=verdict.variant,
            report=f"{name}.json",
        )
        mixes: dict[str, dict[str, str]] = {}
        if verdict.passed and not all(graph.use_int8 for graph in verdict.graphs.values()):
            mixes[verdict.variant] = verdict.variants
            addition.graphs[verdict.variant] = {
                graph: graphs[variant][graph] for graph, variant in verdict.variants.items()
            }
        for variant in (INT8, INT8_FP32):
            if variant in graphs:
                earlier = bundle.manifest.precision_record(variant).verdict
                addition.precisions[variant] = functools.partial(
                    _marked, variant, mark, mixes.get(variant), earlier
                )
    return report


def _marked(
    variant: str,
    mark: VerdictMark,
    mix: dict[str, str] | None,
    earlier: VerdictMark | None,
    record: PrecisionRecord,
) -> PrecisionRecord:
    """Return the record of a variant with the mark, unless a recorded failure must stay.

    Args:
        variant: variant to mark.
        mark: the new mark.
        mix: graph name -> its variant; None keeps the mix of the record.
        earlier: mark of the variant before the graphs were judged.
        record: current record of the variant.

    Raises:
        BundleError: the variant passed, but another verdict failed it meanwhile.
    """
    found = record.verdict
    if mark.passed and found is not None and not found.passed:
        if variant != mark.judged and found.judged == variant:
            return record
        if found != earlier:
            raise BundleError(
                f"{variant} passed this verdict, but failed another one meanwhile, on "
                f"{found.backend}; nothing was written, repeat the verdict"
            )
    return dataclasses.replace(record, verdict=mark, mix=record.mix if mix is None else mix)


def report_from_verdict(
    bundle: Bundle, verdict: Verdict, notes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of the report, plain JSON types."""
    record = bundle.manifest.precision_record(verdict.variant)
    report: dict[str, Any] = {
        "schema_version": 1,
        "model": bundle.manifest.model,
        "weights": dataclasses.asdict(bundle.manifest.checkpoint),
        "made": record_to_json(dataclasses.replace(record, verdict=None, mix=None)),
        **verdict.to_dict(),
        **notes,
        "conditions": conditions(),
    }
    return {key: _finite(value) for key, value in report.items()}


def conditions() -> dict[str, Any]:
    """Return date, CPU and package versions, on which the figures depend."""
    host = Host()
    return {
        "date": utc_now(),
        "cpu": cpu_name(host),
        "cpu_int8": cpu_int8(host),
        "cpu_cores": usable_cpus(),
        "python": platform.python_version(),
        **dict(_versions("onnxruntime", "onnx", "numpy", "torch")),
    }


def _versions(*packages: str) -> Iterator[tuple[str, str]]:
    for package in packages:
        version = version_of(package)
        if version is not None:
            yield package, version


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not support, by None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
