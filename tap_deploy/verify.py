"""Are the graphs still the model? Outputs of sessions against golden samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tap_deploy import graphs
from tap_deploy.captioner import Captioner, blank_after_eos
from tap_deploy.config import TapConfig
from tap_deploy.errors import VerificationError
from tap_deploy.golden import GoldenSample
from tap_deploy.masks import select_mask_token
from tap_deploy.sessions.contract import Session

# Absolute. fp32 graphs differ from the reference by the order of their sums only.
FP32_TOLERANCE = 1e-3

PROMPT_OUTPUTS = (
    graphs.LOW_RES_MASKS,
    graphs.IOU_PREDICTIONS,
    graphs.SEMANTIC_TOKENS,
    graphs.SEMANTIC_EMBEDDINGS,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison. ``tolerance`` 0 asks for equality; ``max_rel`` is for the reader."""

    graph: str
    tensor: str
    sample: str
    shape: tuple[int, ...]
    max_abs: float
    max_rel: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """False too if the difference is not a number."""
        return self.max_abs <= self.tolerance

    def __str__(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        shape = "x".join(map(str, self.shape))
        return (
            f"{verdict} {self.graph:15} {self.tensor:20} {self.sample:14} {shape:>18} "
            f"max abs {self.max_abs:.2e}  rel {self.max_rel:.2e}  tolerance {self.tolerance:.0e}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All comparisons of one verification; an empty one has not passed."""

    checks: tuple[Check, ...]
    backend: str
    precision: str

    @property
    def passed(self) -> bool:
        """True if there were checks and none failed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; a difference that is not finite becomes null."""
        rows = []
        for check in self.checks:
            row = dataclasses.asdict(check) | {"passed": check.passed}
            for key in ("max_abs", "max_rel"):
                row[key] = row[key] if np.isfinite(row[key]) else None
            rows.append(row)
        return {
            "passed": self.passed,
            "backend": self.backend,
            "precision": self.precision,
            "checks": rows,
        }

    def __str__(self) -> str:
        failed = sum(not check.passed for check in self.checks)
        lines = [str(check) for check in self.checks]
        verdict = "PASSED" if self.passed else "FAILED"
        lines.append(
            f"{verdict}: {len(self.checks)} comparisons, {failed} failed "
            f"({self.backend}, {self.precision})"
        )
        return "\n".join(lines)

    def require(self, what: str) -> None:
        """Raise VerificationError if the report has not passed; ``what`` begins the message."""
        if self.passed:
            return
        failures = [check for check in self.checks if not check.passed]
        first = failures[0] if failures else None
        detail = (
            f"{first.graph} {first.tensor} ({first.sample}) is off by {first.max_abs:.2e}, "
            f"tolerance {first.tolerance:.0e}"
            if first
            else "nothing was compared"
        )
        raise VerificationError(
            f"{what}: {len(failures)} of {len(self.checks)} comparisons failed; first: {detail}"
        )


def compare(
    graph: str,
    tensor: str,
    sample: str,
    actual: np.ndarray,
    expected: np.ndarray,
    tolerance: float,
) -> Check:
    """Compare two arrays of any shape; unequal shapes or anything not finite is a miss."""
    max_abs = max_rel = float("inf")
    finite = np.isfinite(actual).all() and np.isfinite(expected).all()
    if actual.shape == expected.shape and finite:
        difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
        max_abs = float(difference.max(initial=0.0))
        scale = float(np.abs(expected.astype(np.float64)).max(initial=0.0))
        max_rel = max_abs / scale if scale else max_abs
    return Check(
        graph=graph,
        tensor=tensor,
        sample=sample,
        shape=tuple(actual.shape),
        max_abs=max_abs,
        max_rel=max_rel,
        tolerance=tolerance,
    )


def verify_sessions(
    sessions: Mapping[str, Session],
    config: TapConfig,
    samples: list[GoldenSample],
    *,
    backend: str,
    precision: str,
    tolerance: float = FP32_TOLERANCE,
    on_check: Callable[[Check], None] | None = None,
) -> Report:
    """Run samples through the three graphs, stage by stage, and compare every output.

    Each stage is fed with what the reference gave to it, so that a difference is found where
    it arises; the captions are also made from end to end, from the picture on.

    Args:
        sessions: one session per graph name.
        config: sizes of the model.
        samples: inputs and expected outputs.
        backend: name for the report.
        precision: name for the report.
        tolerance: largest absolute difference of a float that passes.
        on_check: called with every comparison as it is made.
    """
    verifier = _Verifier(sessions, config, tolerance, on_check)
    for sample in samples:
        embeddings = verifier.check_image_encoder(sample)
        verifier.check_prompt_decoder(sample)
        verifier.check_text_decoder(sample)
        verifier.check_end_to_end(sample, embeddings)
    return Report(checks=tuple(verifier.checks), backend=backend, precision=precision)


class _Verifier:
    """Makes the comparisons of one verification, one method per stage."""

    def __init__(
        self,
        sessions: Mapping[str, Session],
        config: TapConfig,
        tolerance: float,
        on_check: Callable[[Check], None] | None,
    ) -> None:
        self.sessions, self.config, self.tolerance = sessions, config, tolerance
        self.on_check = on_check
        self.checks: list[Check] = []

    def check_image_encoder(self, sample: GoldenSample) -> np.ndarray:
        outputs = self.sessions[graphs.IMAGE_ENCODER].run({graphs.IMAGES: sample.images})
        actual = outputs[graphs.IMAGE_EMBEDDINGS]
        expected = sample.image_embeddings
        self._add(graphs.IMAGE_ENCODER, graphs.IMAGE_EMBEDDINGS, sample, actual, expected)
        return actual

    def check_prompt_decoder(self, sample: GoldenSample) -> None:
        outputs = _decode_prompts(self.sessions, sample, sample.image_embeddings)
        for tensor in PROMPT_OUTPUTS:
            expected = getattr(sample, tensor)
            self._add(graphs.PROMPT_DECODER, tensor, sample, outputs[tensor], expected)
        chosen = select_mask_token(outputs[graphs.IOU_PREDICTIONS], sample.point_labels)
        self._add_exact(graphs.PROMPT_DECODER, "mask_index", sample, chosen, sample.mask_index)

    def check_text_decoder(self, sample: GoldenSample) -> None:
        ids, logits = _decode_text(self.sessions[graphs.TEXT_DECODER], self.config, sample)
        self._add_exact(graphs.TEXT_DECODER, "caption_ids", sample, ids, sample.caption_ids)
        self._add(graphs.TEXT_DECODER, graphs.LOGITS, sample, logits, sample.logits)

    def check_end_to_end(self, sample: GoldenSample, image_embeddings: np.ndarray) -> None:
        outputs = _decode_prompts(self.sessions, sample, image_embeddings)
        index = select_mask_token(outputs[graphs.IOU_PREDICTIONS], sample.point_labels)
        tokens = outputs[graphs.SEMANTIC_TOKENS][np.arange(len(index)), index]
        captioner = Captioner(self.sessions[graphs.TEXT_DECODER], self.config)
        expected = blank_after_eos(sample.caption_ids, self.config.pad_id)
        actual = captioner.generate(tokens)
        self._add_exact("end to end", "caption_ids", sample, actual, expected)

    def _add(
        self,
        graph: str,
        tensor: str,
        sample: GoldenSample,
        actual: np.ndarray,
        expected: np.ndarray,
    ) -> None:
        self._record(compare(graph, tensor, sample.name, actual, expected, self.tolerance))

    def _add_exact(
        self,
        graph: str,
        tensor: str,
        sample: GoldenSample,
        actual: np.ndarray,
        expected: np.ndarray,
    ) -> None:
        self._record(compare(graph, tensor, sample.name, actual, expected, 0))

    def _record(self, check: Check) -> None:
        self.checks.append(check)
        if self.on_check is not None:
            self.on_check(check)


def _decode_prompts(
    sessions: Mapping[str, Session], sample: GoldenSample, image_embeddings: np.ndarray
) -> dict[str, np.ndarray]:
    return sessions[graphs.PROMPT_DECODER].run(
        {
            graphs.IMAGE_EMBEDDINGS: np.ascontiguousarray(image_embeddings[:1]),
            graphs.POINT_COORDS: sample.point_coords,
            graphs.POINT_LABELS: sample.point_labels,
        }
    )


def _decode_text(
    session: Session, config: TapConfig, sample: GoldenSample
) -> tuple[np.ndarray, np.ndarray]:
    """Feed the expected caption step by step: every length of the cache is compared.

    Each step is fed with the reference's token, so one early miss does not spoil the rest.
    Returns ids int64 ``[P, text_seq_len - 1]`` and logits shaped like the sample's.
    """
    rows, steps = len(sample.caption_ids), sample.logits.shape[1]
    cache = session.allocate(graphs.kv_cache_shape(config, rows), "float32")
    ids = sample.caption_ids.copy()
    logits = []
    for position in range(steps + 1):
        feed = sample.caption_ids[:, max(0, position - 1)]
        outputs = session.run(
            {
                graphs.SEMANTIC_TOKENS: np.ascontiguousarray(sample.chosen_tokens),
                graphs.INPUT_IDS: feed.astype(np.int32),
                graphs.POSITION: np.array([position], np.int32),
                graphs.PAST_KEY_VALUES: cache[:position] if position else cache[1:2],
            },
            into={graphs.PRESENT_KEY_VALUES: cache[position : position + 1]},
        )
        if position:
            ids[:, position] = outputs[graphs.NEXT_IDS]
            logits.append(outputs[graphs.LOGITS])
    stacked = np.stack(logits, axis=1)
    if sample.logits.shape[-1] == 1:
        stacked = stacked.max(axis=-1, keepdims=True)
    return ids, stacked
