"""A verification in numbers and sentences: answers, and where error enters and how it grows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tap_deploy import graphs
from tap_deploy.verify.answers import AnswerFloors, AnswerTally, CaptionDifference
from tap_deploy.verify.comparison import HISTOGRAM_EDGES, Comparison, Report
from tap_deploy.verify.tolerances import PROMPT_OUTPUTS

Text = Callable[[int], str]

# The tensors of the chain, in order, with the graph that computes them.
_CHAIN = {
    graphs.IMAGE_EMBEDDINGS: graphs.IMAGE_ENCODER,
    **dict.fromkeys(PROMPT_OUTPUTS, graphs.PROMPT_DECODER),
    graphs.LOGITS: graphs.TEXT_DECODER,
}
_MEASURED_ONLY = "measured only: tap-export verdict judges this precision on real pictures"


def answers_summary(
    tally: AnswerTally, floors: AnswerFloors | None, token_text: Text
) -> dict[str, Any]:
    """Return ``masks``, ``names`` and ``captions``, JSON types.

    Args:
        tally: the answers of the chain.
        floors: least agreement; None if it is only measured.
        token_text: text of a token id.
    """
    failures = [] if floors is None else tally.failures(floors)
    return {
        "masks": _masks(tally, floors, failures),
        "names": _names(tally, floors, failures) if tally.same_top1 else None,
        "captions": _captions(tally, floors, failures, token_text),
    }


def stages_summary(report: Report) -> dict[str, Any]:
    """Return ``stages``: mean relative error of each tensor on its own and in the chain.

    ``stages_sentence`` says where error enters, and how it grows.
    """
    rows = []
    for tensor, graph in _CHAIN.items():
        checks = [check for check in report.checks if check.tensor == tensor]
        alone = _largest(check.mean_rel for check in checks if not check.is_chained)
        chained = _largest(check.mean_rel for check in checks if check.is_chained)
        growth = chained / alone if alone and chained is not None else None
        rows.append(
            {
                "tensor": tensor,
                "graph": graph,
                "isolated": alone,
                "chained": chained,
                "growth": growth,
                "sentence": "" if growth is None else f"{growth:.1f} times as large in the chain",
            }
        )
    return {"stages": rows, "stages_sentence": _where_error_enters(report, rows)}


def histograms_summary(report: Report) -> list[dict[str, Any]]:
    """Return the absolute errors of each tensor over all samples, on its own and in the chain."""
    found = []
    for tensor in _CHAIN:
        for is_chained in (False, True):
            counts = [
                check.histogram
                for check in report.checks
                if check.tensor == tensor and check.is_chained == is_chained and check.histogram
            ]
            if not counts:
                continue
            zeros, below, *bins, above = np.sum(counts, axis=0).tolist()
            bins[0] += below
            bins[-1] += above
            used = np.flatnonzero(bins)
            window = slice(used[0], used[-1] + 1) if len(used) else slice(0)
            edges = HISTOGRAM_EDGES[window.start or 0 : window.stop + 1] if len(used) else ()
            found.append(
                {
                    "tensor": tensor,
                    "stage": "chained" if is_chained else "isolated",
                    "edges": list(edges),
                    "counts": bins[window],
                    "zeros": zeros,
                }
            )
    return found


def check_row(check: Comparison) -> dict[str, Any]:
    """Return a comparison as a row of a page, JSON types; what is not finite is None."""
    return {
        "graph": check.graph,
        "tensor": check.tensor,
        "sample": check.sample,
        "stage": "chained" if check.is_chained else "isolated",
        "shape": list(check.shape),
        "nan": check.num_nan,
        "inf": check.num_inf,
        "relative": check.relative,
        "passed": check.passed if check.is_bounded or not check.passed else None,
        "note": check.note,
        **{
            name: _finite(getattr(check, name))
            for name in ("max_abs", "max_rel", "mean_abs", "mean_rel", "cosine", "tolerance")
        },
        "mean_tolerance": check.mean_tolerance,
    }


def _masks(tally: AnswerTally, floors: AnswerFloors | None, failures: list[str]) -> dict[str, Any]:
    mean, worst = float(np.mean(tally.ious)), min(tally.ious)
    return {
        "passed": _passed(floors, failures, "mask"),
        "sentence": (
            f"mean IoU {mean:.5f}, lowest {worst:.5f}, mean boundary F "
            f"{np.mean(tally.boundary_fs):.5f}; {sum(tally.same_token)} of "
            f"{len(tally.same_token)} regions select the same mask token"
            + ("" if floors else f" ({_MEASURED_ONLY})")
        ),
        "regions": len(tally.ious),
        "iou_mean": mean,
        "iou_worst": worst,
        "boundary_f_mean": float(np.mean(tally.boundary_fs)),
        "boundary_f_worst": min(tally.boundary_fs),
        "same_mask_token": float(np.mean(tally.same_token)),
        "floor": None if floors is None else floors.mask_iou,
    }


def _names(tally: AnswerTally, floors: AnswerFloors | None, failures: list[str]) -> dict[str, Any]:
    return {
        "passed": _passed(floors, failures, "name"),
        "sentence": (
            f"{sum(tally.same_top1)} of {len(tally.same_top1)} regions have the same first "
            f"name; {np.mean(tally.top5_overlap):.1%} of the first five are the same"
        ),
        "regions": len(tally.same_top1),
        "top1": float(np.mean(tally.same_top1)),
        "top5": float(np.mean(tally.top5_overlap)),
        "floor": None if floors is None else floors.concept_top1,
    }


def _captions(
    tally: AnswerTally, floors: AnswerFloors | None, failures: list[str], token_text: Text
) -> dict[str, Any]:
    differs = sorted(tally.differences, key=lambda found: found.near_tie)
    sentence = f"{sum(tally.same_caption)} of {len(tally.same_caption)} are identical"
    if differs:
        sentence += "; first difference: " + _difference_text(differs[0], token_text)
    return {
        "passed": _passed(floors, failures, "caption"),
        "sentence": sentence,
        "regions": len(tally.same_caption),
        "identical": sum(tally.same_caption),
        "floor": None if floors is None else floors.captions_identical,
        "first_differences": [
            {
                "region": found.region,
                "step": found.step,
                "expected": token_text(found.expected),
                "actual": token_text(found.actual),
                "margin": _finite(found.margin),
                "near_tie": found.near_tie,
            }
            for found in differs
        ],
    }


def _difference_text(found: CaptionDifference, token_text: Text) -> str:
    kind = "a near-tie" if found.near_tie else "not a near-tie"
    return (
        f"{found.region}, step {found.step}: {token_text(found.actual)!r}, expected "
        f"{token_text(found.expected)!r}, margin {found.margin:.2g}, {kind}"
    )


def _passed(floors: AnswerFloors | None, failures: list[str], word: str) -> bool | None:
    return None if floors is None else not any(word in failure for failure in failures)


def _where_error_enters(report: Report, rows: list[dict[str, Any]]) -> str:
    failed = [c for c in report.checks if not c.passed and not c.is_chained]
    if failed:
        order = list(graphs.GRAPH_NAMES)
        first = min(failed, key=lambda check: order.index(check.graph))
        return (
            f"Error enters in {first.graph}: with the reference's own inputs, {first.tensor} "
            f"{first.miss}."
        )
    known = [row for row in rows if row["growth"] is not None]
    if not known:
        return "No stage leaves its tolerance."
    most = max(known, key=lambda row: float(row["growth"]))
    return (
        "No stage leaves its tolerance with the reference's own inputs; in the chain, the mean "
        f"error grows most in {most['tensor']}: {most['growth']:.1f} times, to "
        f"{most['chained']:.2g}."
    )


def _largest(values: Iterable[float]) -> float | None:
    return _finite(max(values, default=math.nan))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
