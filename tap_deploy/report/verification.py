"""The page of a verification: every check, where error enters, and what it does to the answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tap_deploy.report.charts import HISTOGRAM_HEIGHT, histogram_from_counts, paired_bars
from tap_deploy.report.mask_pictures import BOTH, ONLY_HERE, ONLY_REFERENCE
from tap_deploy.report.page import page_from_template
from tap_deploy.visualize.colors import Color

_ORDER = {False: 0, True: 1, None: 2}  # of the rows: failed, passed, measured only
_ANSWERS = ("masks", "names", "captions")
_SHOWN_APART = ("passed", "sentence", "first_differences")
_TITLES = {
    "iou_mean": "mask IoU, mean",
    "iou_worst": "mask IoU, worst region",
    "boundary_f_mean": "boundary F, mean",
    "boundary_f_worst": "boundary F, worst region",
    "top1": "same first name",
    "top5": "same first five names",
    "identical": "identical captions",
}


def html_from_verification(report: Mapping[str, Any]) -> str:
    """Return the report of a verification as an HTML document.

    Rows that failed come first. Texts may come from untrusted files.

    Args:
        report: JSON types; numbers that are not finite are None. Its keys:

            - ``title``, ``sentence``: str; ``passed``: bool.
            - ``checks``: one mapping per tensor, sample and stage: ``graph``, ``tensor``,
              ``sample``, ``stage`` ("isolated": with the inputs of the reference; "chained": with
              the outputs of the graphs before), ``shape`` [int], ``max_abs``, ``max_rel``,
              ``mean_abs``, ``mean_rel``, ``cosine`` (float or None), ``nan``, ``inf`` (counts),
              ``tolerance`` (bound on ``max_rel`` if ``relative``, else on ``max_abs``; None:
              measured only), ``relative`` (bool), ``mean_tolerance`` (bound on ``mean_rel``, or
              None), ``passed`` (bool or None), ``note`` (str).
            - ``stages``: ``tensor``, ``isolated`` and ``chained`` (mean relative errors),
              ``growth`` (chained / isolated, or None), ``sentence``; ``stages_sentence``: str.
            - ``histograms``: ``tensor``, ``stage``, ``edges`` (log10 of the absolute error,
              [n + 1]), ``counts`` [n], ``zeros`` (elements without any error).
            - ``masks``, ``names``, ``captions``: None, or ``passed`` (bool or None), ``sentence``,
              ``regions``, and further numbers under any name, which are shown: for masks
              ``iou_mean``, ``iou_worst``, ``boundary_f_mean``, ``boundary_f_worst``, ``floor``;
              for names ``top1``, ``top5`` (shares that agree); for captions ``identical``, and
              ``first_differences``: ``region``, ``step``, ``expected``, ``actual``, ``margin``,
              ``near_tie`` (bool).
            - ``worst``: ``title``, ``iou``, ``boundary_f``, ``reference_png``, ``actual_png``,
              ``difference_png`` (base64, see ``mask_pictures``), ``reference_text``,
              ``actual_text``.
            - ``bisect``: None, or ``graph``, ``node``, ``op_type``, ``tensor``, ``error``,
              ``tolerance``, ``sentence``.
            - ``conditions``: name -> value.

    Raises:
        MissingDependencyError: Jinja2 is not installed.
    """
    checks = sorted(report["checks"], key=lambda check: _ORDER[check["passed"]])
    values = {
        "report": report,
        "checks": checks,
        "counts": Counter(check["passed"] for check in checks),
        "answers": [_answer(name, report[name]) for name in _ANSWERS if report[name] is not None],
        "stages": paired_bars(
            [(stage["tensor"], stage["isolated"], stage["chained"]) for stage in report["stages"]]
        ),
        "histograms": [
            (found, histogram_from_counts(found["edges"], found["counts"]))
            for found in report["histograms"]
        ],
        "histogram_height": HISTOGRAM_HEIGHT,
        "fills": {
            "only in the reference": _css(ONLY_REFERENCE),
            "only in this mask": _css(ONLY_HERE),
            "in both": _css(BOTH),
        },
    }
    return page_from_template("verification.html", values)


def _answer(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a kind of answer with its numbers by title, and the worst differences first."""
    rest = {key: value for key, value in found.items() if key not in _SHOWN_APART}
    return {
        "name": name,
        "passed": found["passed"],
        "sentence": found["sentence"],
        "numbers": {_TITLES.get(key, key.replace("_", " ")): rest[key] for key in rest},
        "differences": sorted(
            found.get("first_differences", ()), key=lambda differs: bool(differs["near_tie"])
        ),
    }


def _css(color: Color) -> str:
    return f"rgb{color}"
