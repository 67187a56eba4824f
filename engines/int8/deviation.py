"""Deviation of int8 graphs from the reference on the golden samples.

Measured when the graphs are created, on onnxruntime's CPU provider, whose int8 products are exact.
``tap_deploy.verify.tolerances.tolerances_for`` derives the int8 tolerances of other machines from
it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from tap_deploy import graphs
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.golden import Golden
from tap_deploy.bundle.precision_record import Deviation, PrecisionRecord
from tap_deploy.bundle.update import revise_precision
from tap_deploy.config import TapConfig
from tap_deploy.precisions import INT8, INT8_FP32
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.opening import sessions_from_variant
from tap_deploy.verify.graph_check import verify_sessions
from tap_deploy.verify.prompt_outputs import decode_all_tokens
from tap_deploy.verify.tolerances import FP16_TOLERANCES, Tolerance

# Infinite tolerances, so that choices are measured by their margins and nothing fails.
_MEASURE = {name: Tolerance(max=math.inf, relative=True) for name in FP16_TOLERANCES}


def record_deviation(bundle: Bundle, *, threads: int | None = None) -> None:
    """Measure the ``int8_fp32`` graphs of a bundle, and record the deviation for both variants.

    Both int8 variants have the same Q/DQ nodes. Call this with all graphs in int8; float graphs
    that a verdict puts in their place later only lower the deviation. A non-finite deviation is
    recorded as null, against which every self-test fails.

    Raises:
        SessionError: a graph fails to run.
        InputError: the bundle cannot be written, or another process has locked it.
        BundleError: another process changed the graphs meanwhile.
    """
    golden = bundle.golden()
    with contextlib.ExitStack() as stack:
        sessions = sessions_from_variant(bundle.variant(INT8_FP32), threads=threads)
        for session in sessions.values():
            stack.enter_context(session)
        report = verify_sessions(
            sessions,
            bundle.config,
            [golden, _chained(sessions, bundle.config, golden)],
            backend="onnxruntime",
            precision=INT8,
            tolerances=_MEASURE,
        )
    found: dict[str, Deviation] = {}
    for name in FP16_TOLERANCES:
        checks = [check for check in report.checks if check.tensor == name]
        found[name] = Deviation(
            max=_finite(max(check.max_rel for check in checks)),
            mean=_finite(max(check.mean_rel for check in checks)),
        )

    def change(record: PrecisionRecord) -> PrecisionRecord:
        return dataclasses.replace(record, golden_deviation=found)

    for variant in (INT8, INT8_FP32):
        if variant in bundle.manifest.graphs:
            revise_precision(bundle, variant, change)


def _chained(sessions: Mapping[str, Session], config: TapConfig, golden: Golden) -> Golden:
    """Return the samples with the int8 graphs' own intermediate outputs.

    Errors add up from graph to graph, and captions are compared end to end.
    """
    first = golden.samples[0]
    encoded = sessions[graphs.IMAGE_ENCODER].run({graphs.IMAGES: first.images})
    embeddings = encoded[graphs.IMAGE_EMBEDDINGS]
    samples = []
    for sample in golden.samples:
        decoder = sessions[graphs.PROMPT_DECODER]
        coords, labels = sample.point_coords, sample.point_labels
        decoded = decode_all_tokens(decoder, config, coords, labels, embeddings)
        samples.append(
            dataclasses.replace(
                sample,
                image_embeddings=embeddings,
                semantic_tokens=decoded[graphs.SEMANTIC_TOKENS],
            )
        )
    tokens = np.concatenate([sample.chosen_tokens for sample in samples])
    captions = dataclasses.replace(golden.captions, semantic_tokens=tokens)
    return dataclasses.replace(golden, samples=tuple(samples), captions=captions)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
