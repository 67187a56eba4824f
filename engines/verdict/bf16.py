"""The verdict on bf16: how often it changes the answers, compared with fp32."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.precision_record import Bf16Verdict, PrecisionRecord
from tap_deploy.bundle.update import revise_precision
from tap_deploy.engines.verdict.agreement import Case, ReferenceAnswers
from tap_deploy.engines.verdict.tally import evaluated_on
from tap_deploy.engines.verdict.verdict import Floors
from tap_deploy.sessions.opening import sessions_from_bundle
from tap_deploy.sessions.run_on import RunOn


def judge_bf16(bundle: Bundle, cases: Iterable[Case], run_on: RunOn, floors: Floors) -> Bf16Verdict:
    """Compare the answers in bf16 with those of the fp32 graphs, and keep the verdict.

    Nothing is timed: a CPU with bf16 multiplies it faster than fp32.

    Args:
        bundle: the bundle.
        cases: pictures with prompts.
        run_on: precision ``bf16`` or ``int8+bf16``, and its backend.
        floors: minimum agreement.

    Raises:
        BundleError: the bundle lacks the graphs, or another process changed them meanwhile.
        InputError: there are no regions, or the bundle cannot be written.
        SessionError: this CPU has no bf16, or a graph fails to run.
    """
    with contextlib.ExitStack() as stack:
        reference = sessions_from_bundle(bundle, RunOn(threads=run_on.threads))
        again = dataclasses.replace(run_on, allow_failed=True)
        candidate = sessions_from_bundle(bundle, again)
        for session in (*reference.values(), *candidate.values()):
            stack.enter_context(session)
        answers = ReferenceAnswers(reference, bundle.config, cases, vocabulary=bundle.vocabulary())
        agreement = answers.agreement(candidate)
    failures = floors.failures(agreement)
    names = agreement.concept_top1
    found = (
        f"mean mask IoU {agreement.mask_iou:.4f}, "
        + ("" if names is None else f"{names:.1%} of the names and ")
        + f"{agreement.captions.identical:.1%} of the captions as in fp32, on "
        + evaluated_on(agreement.regions, agreement.images)
    )
    mark = Bf16Verdict(
        passed=not failures, backend=run_on.backend, sentence="; ".join([found, *failures])
    )

    def change(record: PrecisionRecord) -> PrecisionRecord:
        return dataclasses.replace(record, bf16_verdict=mark)

    revise_precision(bundle, run_on.variant, change)
    return mark
