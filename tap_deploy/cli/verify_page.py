"""The HTML page of a verification."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.report.mask_pictures import mask_pictures
from tap_deploy.report.verification import html_from_verification
from tap_deploy.tokenizer import Tokenizer
from tap_deploy.verify.answers import WorstRegion
from tap_deploy.verify.summary import check_row, histograms_summary, stages_summary
from tap_deploy.verify.verification import Verification


def page_from_verification(bundle: Bundle, found: Verification) -> str:
    """Return the page: every comparison, error by stage, answers, and the worst masks.

    Raises:
        MissingDependencyError: Jinja2 is not installed.
    """
    report, tokenizer = found.report, bundle.tokenizer()
    title = f"Verification: {bundle.manifest.model} ({report.precision}, {report.backend})"
    return html_from_verification(
        {
            "title": title,
            "passed": found.passed,
            "sentence": found.sentence,
            "checks": [check_row(check) for check in report.checks],
            **stages_summary(report),
            "histograms": histograms_summary(report),
            **found.answers,
            "worst": [_worst(region, tokenizer) for region in found.worst],
            "bisect": found.bisection,
            "conditions": found.conditions,
        }
    )


def _worst(region: WorstRegion, tokenizer: Tokenizer | None) -> dict[str, Any]:
    pictures = mask_pictures(region.image, region.expected, region.actual)
    return {
        "title": region.region,
        "iou": region.iou,
        "boundary_f": region.boundary_f,
        **dataclasses.asdict(pictures),
        "reference_text": _text(region.expected_ids, tokenizer),
        "actual_text": _text(region.actual_ids, tokenizer),
    }


def _text(ids: np.ndarray, tokenizer: Tokenizer | None) -> str:
    return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids[None])[0]
