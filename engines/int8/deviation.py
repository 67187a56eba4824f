"""How far int8 graphs are from the reference on the golden samples: what machines are held against.

Measured where the graphs are made, on onnxruntime's CPU provider, which multiplies int8 exactly.
See ``tap_deploy.verify.tolerances.tolerances_for`` for what becomes of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping

from tap_deploy import graphs
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.golden import GoldenSample
from tap_deploy.bundle.precision_record import Deviation, PrecisionRecord
from tap_deploy.bundle.update import revise_precision
from tap_deploy.config import TapConfig
from tap_deploy.precisions import INT8, INT8_FP32
from tap_deploy.sessions.contract import Session
from tap_deploy.sessions.opening import create_session
from tap_deploy.verify.graph_check import decode_all_tokens, verify_sessions
from tap_deploy.verify.tolerances import FP16_TOLERANCES, Tolerance

# Choices by their margins, whatever these are: nothing is judged here.
_MEASURE = {name: Tolerance(max=math.inf, relative=True) for name in FP16_TOLERANCES}


def record_deviation(bundle: Bundle, *, threads: int | None = None) -> None:
    """Measure the ``int8_fp32`` graphs of a bundle, and record it for both int8 variants.

    Both have the same Q/DQ nodes. To be called when all of them are there: graphs that a verdict
    replaces by float ones later deviate less. What is not finite is recorded as null, and nothing
    passes against that.

    Raises:
        SessionError: a graph cannot be run.
        InputError: the bundle cannot be written, or another process holds it.
        BundleError: another process changed the graphs meanwhile.
    """
    sample = GoldenSample.load(bundle.golden_path())
    with contextlib.ExitStack() as stack:
        sessions = {
            name: stack.enter_context(
                create_session(
                    "onnxruntime", bundle.graph_path(name, INT8_FP32), spec, threads=threads
                )
            )
            for name, spec in bundle.graph_specs(INT8_FP32).items()
        }
        report = verify_sessions(
            sessions,
            bundle.config,
            [sample, _chained(sessions, bundle.config, sample)],
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


def _chained(
    sessions: Mapping[str, Session], config: TapConfig, sample: GoldenSample
) -> GoldenSample:
    """Return the sample with what int8 itself hands from graph to graph.

    Stage by stage, errors are small; from end to end they add up, and captions are checked so.
    """
    encoded = sessions[graphs.IMAGE_ENCODER].run({graphs.IMAGES: sample.images})
    embeddings = encoded[graphs.IMAGE_EMBEDDINGS]
    decoder = sessions[graphs.PROMPT_DECODER]
    decoded = decode_all_tokens(decoder, config, sample, embeddings)
    return dataclasses.replace(
        sample,
        image_embeddings=embeddings,
        semantic_tokens=decoded[graphs.SEMANTIC_TOKENS],
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
