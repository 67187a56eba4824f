"""The int8 workflow: split pictures, smooth, calibrate, mix precisions, write, judge."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.update import bundle_addition
from tap_deploy.engines.calibration.pictures import FEW_IMAGES, CalibrationImages
from tap_deploy.engines.calibration.prompts import CalibrationPrompts
from tap_deploy.engines.calibration.table import CalibrationTable
from tap_deploy.engines.int8.add import (
    few_images_warning,
    find_ranges,
    pictures_calibrated_on,
    require_room,
    write_int8,
)
from tap_deploy.engines.int8.blocks import Exclusions
from tap_deploy.engines.int8.budget import AccuracyBudget, budget_sentence
from tap_deploy.engines.int8.candidates import CandidateSessions
from tap_deploy.engines.int8.mix import Mix, MixSearch
from tap_deploy.engines.int8.options import Int8Options
from tap_deploy.engines.qdq.chosen_nodes import ChosenNodes
from tap_deploy.engines.smoothing.smoothed_variant import SmoothedVariant, smoothed_variant
from tap_deploy.engines.verdict.agreement import Case, ReferenceAnswers
from tap_deploy.engines.verdict.judge import VerdictOptions, judge_bundle, require_variants
from tap_deploy.engines.verdict.record import EXCLUSIONS_FILE, record_verdict
from tap_deploy.engines.verdict.regions import cases_from_images, without
from tap_deploy.engines.verdict.speed import OtherRuntime
from tap_deploy.engines.verdict.verdict import Verdict
from tap_deploy.graphs import GRAPH_NAMES
from tap_deploy.precisions import FP32, INT8, INT8_FP32
from tap_deploy.predictor import TapPredictor
from tap_deploy.sessions.opening import sessions_from_bundle
from tap_deploy.sessions.run_on import RunOn

# Number of regions of calibration pictures that the mixed-precision search evaluates on.
SEARCH_REGIONS = 200

OnStage = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Result:
    """Result of the int8 workflow.

    Attributes:
        verdict: the verdict; None if not requested.
        report: content of the bundle's report; empty without a verdict.
        mix: result of the mixed-precision search; None without a budget.
    """

    verdict: Verdict | None
    report: dict[str, Any]
    mix: Mix | None


def make_int8(
    bundle: Bundle,
    options: Int8Options,
    *,
    images: tuple[CalibrationImages, CalibrationImages | None] | None = None,
    others: Mapping[str, OtherRuntime] | None = None,
    on_stage: OnStage | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Int8Result:
    """Quantize a bundle and judge the result; a failed verdict marks the int8 graphs.

    Args:
        bundle: bundle to extend with int8 graphs, ranges, report and exclusions.
        options: options of the workflow.
        images: result of ``options.images()``, if already available.
        others: other runtimes to time in the same run, such as PyTorch eager.
        on_stage: called with the name of each stage before it starts.
        on_warning: called with the text of a warning.

    Raises:
        InputError: the bundle has int8 graphs that may not be replaced, or invalid data or options.
        SessionError: a graph fails to run.
    """
    say = on_stage if on_stage is not None else _say_nothing
    require_room(bundle, force=options.quantize.force)
    calibration, evaluation = options.images() if images is None else images
    if len(calibration) < FEW_IMAGES and on_warning is not None:
        on_warning(few_images_warning(len(calibration)))
    quantize = options.quantize
    selected = quantize.selection(bundle.variant(FP32))
    _excluded(selected, options.exclusions)  # report a typo before the long calibration
    smoothed, tables, mix = _calibrated(bundle, options, calibration, selected, say)
    if mix is not None and not mix.within_budget and on_warning is not None:
        on_warning("no mix of precisions is within the budget; see the report")
    exclusions = options.exclusions if mix is None else mix.exclusions
    say("write int8 graphs")
    write_int8(
        bundle,
        quantize,
        tables,
        _excluded(selected, exclusions),
        images=calibration,
        smoothings=smoothed.smoothings,
        choices=smoothed.choices,
        exclusions=Exclusions() if exclusions is None else exclusions,
    )
    if exclusions is not None:
        _save_exclusions(bundle, exclusions, mix, options.budget)
    if options.verdict is None or evaluation is None:
        return Int8Result(verdict=None, report={}, mix=mix)
    verdict, report = judge_on_images(
        bundle,
        evaluation,
        options.verdict,
        prompts=options.quantize.prompts(),
        others=others,
        notes={
            "mixed_precision": _mix_details(exclusions, mix),
            "smoothquant": _smoothing_details(smoothed),
        },
        held_back=options.evaluation_data is None,
        budget=options.budget,
        on_stage=say,
    )
    return Int8Result(verdict=verdict, report=report, mix=mix)


def _calibrated(
    bundle: Bundle,
    options: Int8Options,
    calibration: CalibrationImages,
    selected: Mapping[str, ChosenNodes],
    say: OnStage,
) -> tuple[SmoothedVariant, dict[str, CalibrationTable], Mix | None]:
    """Smooth and calibrate the fp32 graphs, and search for a mix if there is a budget."""
    quantize = options.quantize
    with smoothed_variant(
        bundle.variant(FP32),
        calibration,
        options.smoothquant,
        prompts=quantize.prompts(),
        threads=quantize.threads,
        on_progress=lambda done, total: say(f"SmoothQuant: picture {done + 1} of {total}"),
    ) as smoothed:
        tables = find_ranges(
            smoothed.variant,
            quantize,
            calibration,
            selected,
            on_progress=lambda done, total: say(f"picture {min(done + 1, total)} of {total}"),
        )
        if options.budget is None:
            return smoothed, tables, None
        candidates = CandidateSessions(
            smoothed.variant,
            tables,
            reduce_range=quantize.reduce_range,
            threads=quantize.threads,
        )
        mix = _search(bundle, options, options.budget, selected, calibration, candidates, say)
        return smoothed, tables, mix


def _smoothing_details(smoothed: SmoothedVariant) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [dataclasses.asdict(choice) for choice in choices]
        for name, choices in smoothed.choices.items()
        if choices
    }


def judge_on_images(
    bundle: Bundle,
    images: CalibrationImages,
    options: VerdictOptions,
    *,
    prompts: CalibrationPrompts | None = None,
    others: Mapping[str, OtherRuntime] | None = None,
    notes: Mapping[str, Any] | None = None,
    held_back: bool = False,
    budget: AccuracyBudget | None = None,
    on_stage: OnStage | None = None,
) -> tuple[Verdict, dict[str, Any]]:
    """Judge the int8 graphs of a bundle on pictures, and record the verdict in the bundle.

    Calibration pictures of the bundle are excluded. With a budget, the report also states whether
    the best mix keeps it on these pictures.

    Returns:
        The verdict and the report.

    Raises:
        BundleError: the bundle lacks a variant.
        InputError: a picture cannot be read, all are calibration pictures, or the bundle cannot be
            written.
        SessionError: a graph fails to run.
    """
    require_variants(bundle, options)
    calibrated_on = pictures_calibrated_on(bundle)
    images = without(images, calibrated_on)
    (on_stage or _say_nothing)("propose regions")
    cases = list(_cases(bundle, images, prompts, options.threads))
    verdict = judge_bundle(
        bundle,
        cases,
        options,
        calibrated_on=len(calibrated_on),
        others=others,
        on_stage=on_stage,
    )
    data = {
        "pictures to judge on": len(images),
        "where they come from": "held out from the calibration data, by the SHA-256 of the files"
        if held_back
        else "evaluation data",
        "regions": "the user's prompts, if given; otherwise proposed by the fp32 graphs on a grid "
        "of points, prompted by box and by point alternately",
        "fingerprint": images.fingerprint,
    }
    more = dict(notes or {})
    if budget is not None:
        more["budget"] = {
            "allowed": dataclasses.asdict(budget),
            "use": budget.use(verdict.mix),
            "sentence": budget_sentence(budget, verdict.mix),
        }
    return verdict, record_verdict(bundle, verdict, notes={"data": data, **more})


def _search(
    bundle: Bundle,
    options: Int8Options,
    budget: AccuracyBudget,
    selected: Mapping[str, ChosenNodes],
    images: CalibrationImages,
    candidates: CandidateSessions,
    say: OnStage,
) -> Mix:
    """Search the blocks that must stay float, on calibration pictures only."""
    threads = options.quantize.threads
    say("propose regions for the mixed-precision search")
    cases = _until(_cases(bundle, images, options.quantize.prompts(), threads), SEARCH_REGIONS)
    with contextlib.ExitStack() as stack:
        reference = sessions_from_bundle(bundle, RunOn(threads=threads))
        for session in reference.values():
            stack.callback(session.close)
        answers = ReferenceAnswers(reference, bundle.config, cases, vocabulary=bundle.vocabulary())
        nodes = {name: chosen.nodes for name, chosen in selected.items()}
        return MixSearch(answers, nodes, candidates, budget, on_trial=say).run()


def _cases(
    bundle: Bundle,
    images: CalibrationImages,
    prompts: CalibrationPrompts | None,
    threads: int | None,
) -> Iterator[Case]:
    sessions = sessions_from_bundle(bundle, RunOn(threads=threads))
    with TapPredictor(sessions, bundle.config) as predictor:
        yield from cases_from_images(predictor, images, prompts=prompts)


def _until(cases: Iterator[Case], num_regions: int) -> Iterator[Case]:
    """Yield cases until they contain at least ``num_regions`` regions."""
    found = 0
    for case in cases:
        yield case
        found += len(case.prompts)
        if found >= num_regions:
            return


def _excluded(
    selected: Mapping[str, ChosenNodes], exclusions: Exclusions | None
) -> dict[str, ChosenNodes]:
    chosen = Exclusions() if exclusions is None else exclusions
    return {
        name: dataclasses.replace(selected[name], nodes=chosen.keep(name, selected[name].nodes))
        for name in GRAPH_NAMES
    }


def _mix_details(exclusions: Exclusions | None, mix: Mix | None) -> dict[str, Any]:
    if mix is not None:
        return mix.to_dict()
    return {} if exclusions is None else {"exclude": exclusions.to_dict()}


def _save_exclusions(
    bundle: Bundle, exclusions: Exclusions, mix: Mix | None, budget: AccuracyBudget | None
) -> None:
    """Store the list in the bundle; users can edit it and pass it to ``--exclusions``."""
    details = _mix_details(exclusions, mix)
    details["budget"] = None if budget is None else dataclasses.asdict(budget)
    with bundle_addition(bundle, based_on=(INT8, INT8_FP32)) as addition:
        path = addition.folder / EXCLUSIONS_FILE
        path.parent.mkdir()
        path.write_text(json.dumps(details, indent=2) + "\n", "utf-8")


def _say_nothing(stage: str) -> None:
    """Ignore progress; the default callback."""
